// exp, expm1, log1p, sine, cosine and the normal distribution, without branches, so that loops over them are
// vectorised for every instruction set and by every compiler. Accurate to a few units of rounding.
// Included by products.h, which defines the number type.

namespace {
namespace elementary {

template <class T>
inline __attribute__((always_inline)) T polynomial(T, T c) {
    return c;
}
template <class T, class... More>
inline __attribute__((always_inline)) T polynomial(T x, T c, More... more) {
    return c + x * polynomial(x, more...);
}

#if REAL_IS_DOUBLE
typedef uint64_t bits;
enum { MANTISSA = 52, BIAS = 1023 };
const real LOWEST = -746, HIGHEST = 710; // exp is 0 and infinite there
const real TANH_ONE = 40;                // tanh of half of it is 1
const real LN2_HIGH = 6.93147180369123816490e-01, LN2_LOW = 1.90821492927058770002e-10;
#else
typedef uint32_t bits;
enum { MANTISSA = 23, BIAS = 127 };
const real LOWEST = -104, HIGHEST = 89;
const real TANH_ONE = 20;
const real LN2_HIGH = 6.93145752e-01f, LN2_LOW = 1.42860677e-06f;
#endif
const real LOG2_E = 1.44269504088896340735992468100, INV_SQRT_2 = 0.70710678118654752440084436210485;
// added to a number of moderate size, its integer part ends up in the last bits
const real SHIFT = 3 * (real)((bits)1 << (MANTISSA - 1));

inline real power_of_two(real shifted) { // the integer part of shifted - SHIFT is the exponent
    bits b;
    real power;
    __builtin_memcpy(&b, &shifted, sizeof b);
    b = (b + BIAS) << MANTISSA;
    __builtin_memcpy(&power, &b, sizeof b);
    return power;
}

inline real exp_minus_one_small(real r) { // |r| <= ln(2) / 2
#if REAL_IS_DOUBLE
    return r * polynomial<real>(r,
            1, 0.5, 0.166666666666666667, 0.0416666666666666667, 0.00833333333333333333,
            0.00138888888888888889, 0.000198412698412698413, 0.0000248015873015873016,
            2.75573192239858907e-6, 2.75573192239858907e-7, 2.50521083854417188e-8,
            2.0876756987868099e-9, 1.60590438368216146e-10);
#else
    return r * polynomial<real>(r, 
            1.0f, 0.5f, 0.1666666667f, 0.04166666667f, 0.008333333333f, 0.001388888889f,
            0.0001984126984f);
#endif
}

inline real exp(real x) {
    x = x < LOWEST ? LOWEST : x;
    x = x > HIGHEST ? HIGHEST : x; // NaN stays
    real k = x * LOG2_E + SHIFT - SHIFT, half = k * (real)0.5 + SHIFT;
    real r = x - k * LN2_HIGH - k * LN2_LOW;
    // in two factors, since the exponent may be out of range by itself
    real rest = k - (half - SHIFT) + SHIFT;
    return (1 + exp_minus_one_small(r)) * power_of_two(half) * power_of_two(rest);
}

inline real tanh(real x) {
    real a = 2 * F(__builtin_fabs)(x);
    a = a > TANH_ONE ? TANH_ONE : a;
    real shifted = a * LOG2_E + SHIFT, k = shifted - SHIFT, power = power_of_two(shifted);
    real e = power * exp_minus_one_small(a - k * LN2_HIGH - k * LN2_LOW) + (power - 1); // exp(a) - 1
    return F(__builtin_copysign)(e / (e + 2), x);
}

inline real log1p_of_unit(real x) { // of x from 0 to 1: twice the inverse of tanh
    real s = x / (2 + x), q = s * s;
#if REAL_IS_DOUBLE
    return 2 * s * polynomial<real>(q, 
        1.0, 1.0 / 3, 1.0 / 5, 1.0 / 7, 1.0 / 9, 1.0 / 11, 1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19,
        1.0 / 21, 1.0 / 23, 1.0 / 25, 1.0 / 27, 1.0 / 29, 1.0 / 31, 1.0 / 33);
#else
    return 2 * s * polynomial<real>(q, 1.0f, 1.0f / 3, 1.0f / 5, 1.0f / 7, 1.0f / 9, 1.0f / 11, 1.0f / 13, 1.0f / 15);
#endif
}

// to absolute errors of rounding, up to some 1e9 quarters of a turn
inline void sine_cosine(real x, real &sine, real &cosine) {
    // the number of quarters, and what is left of the angle, of which float has too few digits
    const double LARGE = 3 * (double)(1ll << 51);
    double k = x * 0.63661977236758134307553505349005744 + LARGE - LARGE;
    double left = x - k * 1.57079632673412561417e+00 - k * 6.07710050630396597660e-11 - k * 2.02226624879595063154e-21;
    left = left < -1 ? -1 : left; // of what is out of range; NaN stays
    real r = (real)(left > 1 ? 1 : left), q = r * r;
    real turn = (real)(k * 0.25 - (k * 0.25 + LARGE - LARGE)); // 0, 1/4, -1/2 or 1/2, -1/4
#if REAL_IS_DOUBLE
    real s = r * polynomial<real>(q, 1, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800,
                                  1.0 / 6227020800, -1.0 / 1307674368000);
    real c = polynomial<real>(q, 1, -0.5, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600,
                              -1.0 / 87178291200, 1.0 / 20922789888000);
#else
    real s = r * polynomial<real>(q, 1, -1.0f / 6, 1.0f / 120, -1.0f / 5040, 1.0f / 362880);
    real c = polynomial<real>(q, 1, -0.5f, 1.0f / 24, -1.0f / 720, 1.0f / 40320, -1.0f / 3628800);
#endif
    real size = turn < 0 ? -turn : turn;
    bool odd = size == (real)0.25;
    real of_sine = odd ? c : s, of_cosine = odd ? s : c;
    sine = turn < 0 || turn == (real)0.5 ? -of_sine : of_sine;
    cosine = turn == (real)0.25 || size == (real)0.5 ? -of_cosine : of_cosine;
}

// the distribution function at z, given exp(-z * z / 2): that times a polynomial which was fitted to
// (1 + 2 u) exp(u * u) erfc(u) in t = (u - 3.75) / (u + 3.75)
inline real normal_cdf(real z, real e) {
    real u = F(__builtin_fabs)(z) * INV_SQRT_2;
    u = u > 30 ? 30 : u; // the tail is 0 long before
    real t = (u - (real)3.75) / (u + (real)3.75);
#if REAL_IS_DOUBLE
    real p = polynomial<real>(t,
        1.23751263083782753, -0.140240598585545256, 0.00358541548547902564, 0.0822767384899950626,
        -0.108803930142444613, 0.0923043211642812499, -0.0586933985766493384,
        0.0283622773721111388, -0.00974657968326526223, 0.00175562616519706507,
        0.00029371437804495803, -0.000290155352460776553, 0.0000516465297417741613,
        0.0000223875657149118166, -0.0000114380480333468936, -9.79262570730352203e-7,
        1.74198215862248159e-6, -5.0844653786873022e-8, -2.48571262480167429e-7,
        1.87908232237004813e-8, 3.19792667166680429e-8, -1.95513588689856165e-9,
        -2.62310734713347576e-9);
#else
    real p = polynomial<real>(t,
        1.237512619f, -0.1402406583f, 0.003586270394f, 0.08227841998f, -0.1088142701f,
        0.09229076959f, -0.05864685874f, 0.02840925236f, -0.00984449486f, 0.001675912218f,
        0.000396307613f, -0.0002241167467f);
#endif
    real tail = (real)0.5 * e * p / (1 + 2 * u);
    return z < 0 ? tail : 1 - tail;
}

} // namespace elementary
} // namespace
