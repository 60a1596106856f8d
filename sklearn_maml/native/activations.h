// Activations: values, and first and second derivatives. Included after products.h.

namespace {

enum Activation { IDENTITY, RELU, LEAKY_RELU, TANH, SIGMOID, ELU, SELU, GELU, SILU, SOFTPLUS, SOFTSIGN, N_ACTIVATIONS };
// those whose derivative needs the input, beside the output
static inline bool keeps_input(int act) { return act == GELU || act == SILU; }
static inline bool is_curved(int act) { return act > LEAKY_RELU; }

static const real SELU_SCALE = 1.0507009873554804934193349852946;
static const real SELU_ALPHA = 1.6732632423543772848170429916717;
static const real INV_SQRT_2PI = 0.39894228040143267793994605993438;

// value, first and second derivative; z is the input, x the output
struct Relu {
    static inline real f(real z, real) { return z < 0 ? 0 : z; }
    static inline real d1(real, real x, real) { return x <= 0 ? 0 : 1; }
    static inline real d2(real, real, real) { return 0; }
};
struct Leaky {
    static inline real f(real z, real a) { return z > 0 ? z : a * z; }
    static inline real d1(real, real x, real a) { return x > 0 ? 1 : a; }
    static inline real d2(real, real, real) { return 0; }
};
struct Tanh {
    static inline real f(real z, real) { return elementary::tanh(z); }
    static inline real d1(real, real x, real) { return 1 - x * x; }
    static inline real d2(real, real x, real) { return -2 * x * (1 - x * x); }
};
struct Sigmoid {
    static inline real f(real z, real) { return 1 / (1 + elementary::exp(-z)); }
    static inline real d1(real, real x, real) { return x * (1 - x); }
    static inline real d2(real, real x, real) { return x * (1 - x) * (1 - 2 * x); }
};
struct Elu {
    static inline real f(real z, real a) { real e = a * (elementary::exp(z) - 1); return z > 0 ? z : e; }
    static inline real d1(real, real x, real a) { return x > 0 ? 1 : x + a; }
    static inline real d2(real, real x, real a) { return x > 0 ? 0 : x + a; }
};
struct Selu {
    static inline real f(real z, real) { real e = SELU_ALPHA * (elementary::exp(z) - 1); return SELU_SCALE * (z > 0 ? z : e); }
    static inline real d1(real, real x, real) { return x > 0 ? SELU_SCALE : x + SELU_SCALE * SELU_ALPHA; }
    static inline real d2(real, real x, real) { return x > 0 ? 0 : x + SELU_SCALE * SELU_ALPHA; }
};
struct Gelu {
    static inline real bell(real z) { return elementary::exp((real)-0.5 * z * z); }
    static inline real cdf(real z) { return elementary::normal_cdf(z, bell(z)); }
    static inline real pdf(real z) { return INV_SQRT_2PI * bell(z); }
    static inline real f(real z, real) { return z * cdf(z); }
    static inline real d1(real z, real, real) { return cdf(z) + z * pdf(z); }
    static inline real d2(real z, real, real) { return (2 - z * z) * pdf(z); }
};
struct Silu {
    static inline real s(real z) { return 1 / (1 + elementary::exp(-z)); }
    static inline real f(real z, real) { return z * s(z); }
    static inline real d1(real z, real, real) { real t = s(z); return t * (1 + z * (1 - t)); }
    static inline real d2(real z, real, real) { real t = s(z); return t * (1 - t) * (2 + z * (1 - 2 * t)); }
};
struct Softplus {
    static inline real f(real z, real) {
        real x = (z > 0 ? z : 0) + elementary::log1p_of_unit(elementary::exp(z < 0 ? z : -z));
        return z > 20 ? z : x; // as torch
    }
    static inline real s(real x) { real e = elementary::exp(-x); return x > 20 ? 1 : 1 - e; }
    static inline real d1(real, real x, real) { return s(x); }
    static inline real d2(real, real x, real) { return s(x) * (1 - s(x)); }
};
struct Softsign {
    static inline real f(real z, real) { return z / (1 + (z < 0 ? -z : z)); }
    static inline real d1(real, real x, real) { real t = 1 - (x < 0 ? -x : x); return t * t; }
    static inline real d2(real, real x, real) {
        real t = 1 - (x < 0 ? -x : x);
        return (x < 0 ? 2 : -2) * t * t * t;
    }
};

struct Maps {
    void (*forward)(i64 n, real a, const real *z, real *x);
    void (*scale)(i64 n, real a, const real *z, const real *x, const real *d, real *out);
    void (*curve)(i64 n, real a, const real *z, const real *x, const real *rz, const real *dx,
                  const real *rdx, real *out);
};
template <class F>
static void map_forward(i64 n, real a, const real *z, real *x) {
    for (i64 i = 0; i < n; i++) x[i] = F::f(z[i], a);
}
template <class F>
static void map_scale(i64 n, real a, const real *z, const real *x, const real *d, real *out) {
    for (i64 i = 0; i < n; i++) out[i] = F::d1(z[i], x[i], a) * d[i];
}
template <class F>
static void map_curve(i64 n, real a, const real *z, const real *x, const real *rz, const real *dx,
                      const real *rdx, real *out) {
    for (i64 i = 0; i < n; i++)
        out[i] = F::d2(z[i], x[i], a) * rz[i] * dx[i] + F::d1(z[i], x[i], a) * rdx[i];
}
#define MAPS(F) {map_forward<F>, map_scale<F>, map_curve<F>}
static const Maps maps[N_ACTIVATIONS] = {{0, 0, 0},     MAPS(Relu), MAPS(Leaky), MAPS(Tanh), MAPS(Sigmoid),
                                         MAPS(Elu),     MAPS(Selu), MAPS(Gelu),  MAPS(Silu), MAPS(Softplus),
                                         MAPS(Softsign)};

} // namespace
