// Vectors of numbers, and products of matrices. Included by mlp.cpp and head.cpp, for each number type
// (REAL) and instruction set.

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

typedef REAL real;
typedef int64_t i64;

#if REAL_IS_DOUBLE
#define F(name) name
#define EPSILON DBL_EPSILON
#else
#define F(name) name##f
#define EPSILON FLT_EPSILON
#endif
#include "elementary.h"

namespace {

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
enum { PANEL = 4 };
#elif defined(__AVX__)
#define VECTOR_BYTES 32
enum { PANEL = 2 };
#else
#define VECTOR_BYTES 16
enum { PANEL = 2 };
#endif
enum { V = VECTOR_BYTES / sizeof(real), MAX_ROWS = 8, MAX_LAYERS = 32 };
typedef real vec __attribute__((vector_size(VECTOR_BYTES)));

static inline i64 pad(i64 n) { return (n + V - 1) / V * V; }
static inline vec load(const real *p) { return *(const vec *)p; }
static inline void store(real *p, vec x) { *(vec *)p = x; }
static inline vec splat(real a) { return a - (vec){}; }

#if REAL_IS_DOUBLE
typedef i64 lanes __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef int32_t lanes __attribute__((vector_size(VECTOR_BYTES)));
#endif
#if defined(__GNUC__) && !defined(__clang__)
#define HAS_SHUFFLE 1
#endif

static inline real sum(vec x) {
#if HAS_SHUFFLE
#pragma GCC unroll 4
    for (int half = V / 2; half; half /= 2) {
        lanes rotated;
#pragma GCC unroll 16
        for (int i = 0; i < V; i++) rotated[i] = (i + half) % V;
        x += __builtin_shuffle(x, rotated);
    }
    return x[0];
#else
    real total = 0;
    for (int i = 0; i < V; i++) total += x[i];
    return total;
#endif
}

static inline real dot_rows(i64 n, const real *a, const real *b) { // of whole vectors
    vec acc = {};
    for (i64 j = 0; j < n; j += V) acc += load(a + j) * load(b + j);
    return sum(acc);
}

// ---- matrix products ---------------------------------------------------------------------------
// Matrices that are read or written by vectors have rows padded to a multiple of V and aligned.

// A product of matrices, or the sum of two of the same strides (the second may be absent); element
// (i, p) of A is a[i * rs + p * cs]
struct Product {
    i64 k, rs, cs, ldb;
    const real *a[2], *b[2];
    i64 shift; // of the rows of b: the panel at hand
};

template <int MR, int NV>
static inline void add_product(vec (&acc)[MR][NV], i64 k, const real *a, i64 rs, i64 cs, const real *b, i64 ldb) {
    for (i64 p = 0; p < k; p++) {
        vec row[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) row[j] = load(b + p * ldb + j * V);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
            vec x = splat(a[i * rs + p * cs]);
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) acc[i][j] += x * row[j];
        }
    }
}

// C = init + the product, for MR rows from row `first` on and NV vectors
template <int MR, int NV>
static void tile(const Product &q, i64 first, const real *init, i64 ldi, real *c, i64 ldc) {
    vec acc[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) acc[i][j] = init ? load(init + i * ldi + j * V) : (vec){};
    add_product(acc, q.k, q.a[0] + first * q.rs, q.rs, q.cs, q.b[0] + q.shift, q.ldb);
    if (q.a[1]) add_product(acc, q.k, q.a[1] + first * q.rs, q.rs, q.cs, q.b[1] + q.shift, q.ldb);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) store(c + i * ldc + j * V, acc[i][j]);
}

typedef void (*Tile)(const Product &, i64, const real *, i64, real *, i64);
#define TILES(NV) {tile<1, NV>, tile<2, NV>, tile<3, NV>, tile<4, NV>, tile<5, NV>, tile<6, NV>, tile<7, NV>, tile<8, NV>}
static const Tile tiles[][MAX_ROWS] = {TILES(1), TILES(2)
#if VECTOR_BYTES == 64
    , TILES(3), {tile<1, 4>, tile<2, 4>, tile<3, 4>, tile<4, 4>, tile<5, 4>, tile<6, 4>, 0, 0}
#endif
};
// rows of a tile, by its number of vectors: as many as there are registers for
#if VECTOR_BYTES == 64
static const int tile_rows[] = {8, 8, 8, 6};
#else
static const int tile_rows[] = {8, 6};
#endif

// C[m, n] = init + the product, all of n's padding too
static void multiply(i64 m, i64 n, Product q, const real *init, i64 ldi, real *c, i64 ldc) {
    i64 vectors = pad(n) / V, panels = (vectors + PANEL - 1) / PANEL;
    q.shift = 0;
    for (i64 panel = 0; panel < panels; panel++) {
        i64 nv = vectors / panels + (panel < vectors % panels);
        i64 most = tile_rows[nv - 1], blocks = (m + most - 1) / most;
        for (i64 t = 0, i = 0; t < blocks; t++) {
            i64 mr = m / blocks + (t < m % blocks);
            tiles[nv - 1][mr - 1](q, i, init ? init + i * ldi + q.shift : 0, ldi, c + i * ldc + q.shift, ldc);
            i += mr;
        }
        q.shift += nv * V;
    }
}

#if HAS_SHUFFLE
template <int S>
static inline void exchange(vec *r) {
    lanes low, high;
#pragma GCC unroll 16
    for (int j = 0; j < V; j++) {
        low[j] = j & S ? V + j - S : j;
        high[j] = j & S ? V + j : j + S;
    }
#pragma GCC unroll 16
    for (int i = 0; i < V; i++)
        if (!(i & S)) {
            vec x = r[i], y = r[i + S];
            r[i] = __builtin_shuffle(x, y, low);
            r[i + S] = __builtin_shuffle(x, y, high);
        }
}
static inline void turn(vec *r) {
    exchange<1>(r);
    if (V > 2) exchange<(V > 2 ? 2 : 1)>(r);
    if (V > 4) exchange<(V > 4 ? 4 : 1)>(r);
    if (V > 8) exchange<(V > 8 ? 8 : 1)>(r);
}
#else
static inline void turn(vec *r) {
    for (int i = 0; i < V; i++)
        for (int j = 0; j < i; j++) {
            real x = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = x;
        }
}
#endif

static inline vec load_part(const real *p, i64 n) {
    vec x = {};
    memcpy(&x, p, n * sizeof(real));
    return x;
}

// dst[n, m] = src[m, n]^T; dst is padded with zeros, src need not be aligned unless PADDED
template <bool PADDED>
static void transpose(i64 m, i64 n, const real *src, i64 lds, real *dst, i64 ldd) {
    for (i64 i = 0; i < m; i += V)
        for (i64 j = 0; j < n; j += V) {
            i64 rows = m - i < V ? m - i : V, columns = n - j < V ? n - j : V;
            vec r[V];
            if (rows < V)
                for (int t = 0; t < V; t++) r[t] = (vec){};
            for (int t = 0; t < rows; t++) {
                const real *from = src + (i + t) * lds + j;
                r[t] = PADDED ? load(from) : load_part(from, columns);
            }
            turn(r);
            for (int t = 0; t < columns; t++) store(dst + (j + t) * ldd + i, r[t]);
        }
}

static void copy_rows(i64 m, i64 n, const real *src, i64 lds, real *dst, i64 ldd) {
    for (i64 i = 0; i < m; i++) {
        memcpy(dst + i * ldd, src + i * lds, n * sizeof(real));
        memset(dst + i * ldd + n, 0, (ldd - n) * sizeof(real));
    }
}

} // namespace
