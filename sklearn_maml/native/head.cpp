// Outputs and gradient of a Gaussian head: a linear model on [1, x, h(x)], with a Gaussian prior, whose weights are
// conditioned on the support rows of a task in closed form. See learners/gaussian.py for what it is.
//
// For the columns S of a task's rows, the noise n and the residuals r to the prior mean, with support
// rows first, S S' + n = L L' and W = inv(L): the support rows alone have the leading blocks of both,
// so that what query rows add to the negative log density is a sum over their rows of W,
//
//     sum over p >= k of (W_p r)^2 / 2 - log W_pp,
//
// whose derivative in S S' is half of sum W_p' W_p, less that of inv(A) r r' inv(A). Factors are of
// double precision. Likelihoods without a closed form take Newton steps, see `newton`.
//
// Threads take some of the tasks of a member. Compiled as mlp.cpp is.

#include "products.h"

#include "activations.h"
#include "blocks.h"
#include "likelihoods.h"

namespace {

enum { ROWS_AT_A_TIME = 128, TASKS_PER_PART = 8, MAX_PARTS = 16, N_VECTORS = 12 };

// in the order of `PARTS` of native/head.py; then weight and bias of each layer in turn
enum Tensor { FACTOR, LOG_SCALE, LOG_NOISE, MEAN, FREQUENCY, LOG_CODE, SURPRISE, LOG_AMPLITUDE, LAYERS, N_TENSORS = LAYERS + 2 * MAX_LAYERS };

// Sizes, and where the parameters of a member are, packed. Columns of the features of a row are in
// three parts, each padded: those of the last layer, cosines and sines.
struct Shape {
    i64 n_members, n_inputs, n_linear, n_outputs, n_noises, n_waves, n_layers, classes, same_classes, likelihood;
    i64 units[MAX_LAYERS], act[MAX_LAYERS];
    double beyond, floor, delta;
    real slope, spread;
    // padded: inputs with a 1 before them, linear columns, units and waves; all features, all columns
    i64 in, linear, hidden[MAX_LAYERS], waves, features, columns, outputs;
    // packed: what inputs are multiplied with at first (`first` columns), further layers, ...
    i64 first, input, weight[MAX_LAYERS], bias[MAX_LAYERS], scale, mean_linear, mean, noise, amplitude, code, surprise, size;
    i64 turned[MAX_LAYERS], size_with_turned;

    i64 last() const { return hidden[n_layers - 1]; }
    i64 width() const { return units[n_layers - 1] + 2 * n_waves; }
    i64 place(i64 column) const {
        i64 n = units[n_layers - 1];
        if (column < n) return column;
        return column < n + n_waves ? last() + column - n : last() + waves + column - n - n_waves;
    }
};

static void describe(const i64 *sizes, const double *numbers, Shape &s) {
    s.n_members = sizes[0], s.n_inputs = 1 + sizes[1], s.n_linear = sizes[2], s.n_outputs = sizes[3];
    s.n_noises = sizes[4], s.n_waves = sizes[5], s.classes = sizes[6], s.same_classes = sizes[7];
    s.likelihood = sizes[8], s.n_layers = sizes[9];
    s.slope = (real)numbers[0], s.spread = (real)numbers[1], s.beyond = numbers[2], s.floor = numbers[3];
    s.delta = numbers[4];
    for (i64 l = 0; l < s.n_layers; l++) {
        s.units[l] = sizes[10 + 2 * l], s.act[l] = sizes[11 + 2 * l];
        s.hidden[l] = pad(s.units[l]);
    }
    s.in = pad(s.n_inputs), s.linear = pad(s.n_linear), s.waves = pad(s.n_waves), s.outputs = pad(s.n_outputs);
    s.features = s.last() + 2 * s.waves, s.columns = s.linear + s.features;
    s.first = s.linear + s.hidden[0] + s.waves;
    i64 at = 0;
    s.input = at, at += s.n_inputs * s.first;
    for (i64 l = 1; l < s.n_layers; l++) {
        s.weight[l] = at, at += s.units[l - 1] * s.hidden[l];
        s.bias[l] = at, at += s.hidden[l];
    }
    s.scale = at, at += s.features;
    s.mean_linear = at, at += s.n_outputs * s.in;
    s.mean = at, at += s.n_outputs * s.features;
    s.noise = at, at += pad(s.n_noises);
    s.amplitude = at, at += s.outputs;
    s.code = at, at += V;
    s.surprise = at, at += V;
    s.size = at;
    for (i64 l = 1; l < s.n_layers; l++) s.turned[l] = at, at += s.units[l] * s.hidden[l - 1];
    s.size_with_turned = at;
}

// parameters of member j into what was filled with zeros
static void pack(const Shape &s, const real *const *tensors, i64 j, real *out) {
    const real *part[N_TENSORS];
    const i64 n = s.n_linear, d = s.n_inputs - 1, C = s.n_outputs;
    const i64 counts[] = {n * n, s.width(), s.n_noises, (n + s.width()) * C, d * s.n_waves, 1, 1, C - 1};
    for (i64 t = 0; t < LAYERS; t++) part[t] = tensors[t] ? tensors[t] + j * counts[t] : 0;
    for (i64 l = 0; l < s.n_layers; l++) {
        part[LAYERS + 2 * l] = tensors[LAYERS + 2 * l] + j * (l ? s.units[l - 1] : d) * s.units[l];
        part[LAYERS + 2 * l + 1] = tensors[LAYERS + 2 * l + 1] + j * s.units[l];
    }
    real *input = out + s.input;
    for (i64 i = 0; i < n; i++)
        for (i64 c = 0; c < n; c++) input[i * s.first + c] = s.spread * part[FACTOR][i * n + c];
    copy_rows(1, s.units[0], part[LAYERS + 1], s.units[0], input + s.linear, s.hidden[0]);
    for (i64 i = 0; i < d; i++) {
        real *row = input + (1 + i) * s.first + s.linear;
        memcpy(row, part[LAYERS] + i * s.units[0], s.units[0] * sizeof(real));
        if (s.n_waves) memcpy(row + s.hidden[0], part[FREQUENCY] + i * s.n_waves, s.n_waves * sizeof(real));
    }
    for (i64 l = 1; l < s.n_layers; l++) {
        copy_rows(s.units[l - 1], s.units[l], part[LAYERS + 2 * l], s.units[l], out + s.weight[l], s.hidden[l]);
        copy_rows(1, s.units[l], part[LAYERS + 2 * l + 1], s.units[l], out + s.bias[l], s.hidden[l]);
        transpose<true>(s.units[l - 1], s.units[l], out + s.weight[l], s.hidden[l], out + s.turned[l], s.hidden[l - 1]);
    }
    for (i64 i = 0; i < s.width(); i++) out[s.scale + s.place(i)] = elementary::exp(part[LOG_SCALE][i]);
    for (i64 c = 0; c < C && !s.same_classes; c++) {
        for (i64 i = 0; i < n; i++) out[s.mean_linear + c * s.in + i] = part[MEAN][i * C + c];
        for (i64 i = 0; i < s.width(); i++)
            out[s.mean + c * s.features + s.place(i)] = part[MEAN][(n + i) * C + c];
    }
    for (i64 o = 0; o < s.n_noises; o++)
        out[s.noise + o] = elementary::exp(2 * part[LOG_NOISE][o]) + (real)s.floor;
    for (i64 o = 0; o < C; o++)
        out[s.amplitude + o] = o && part[LOG_AMPLITUDE] ? elementary::exp(part[LOG_AMPLITUDE][o - 1]) : 1;
    out[s.code] = part[LOG_CODE] ? elementary::exp(part[LOG_CODE][0]) : 1;
    out[s.surprise] = part[SURPRISE] ? part[SURPRISE][0] : 0;
}

// packed gradients of member j into natural tensors
static void unpack(const Shape &s, const real *grad, const real *const *tensors, i64 j, real *const *grads) {
    const i64 n = s.n_linear, d = s.n_inputs - 1, C = s.n_outputs;
    const real *input = grad + s.input;
    for (i64 i = 0; i < n; i++)
        for (i64 c = 0; c < n; c++) grads[FACTOR][(j * n + i) * n + c] = s.spread * input[i * s.first + c];
    memcpy(grads[LAYERS + 1] + j * s.units[0], input + s.linear, s.units[0] * sizeof(real));
    for (i64 i = 0; i < d; i++) {
        const real *row = input + (1 + i) * s.first + s.linear;
        memcpy(grads[LAYERS] + (j * d + i) * s.units[0], row, s.units[0] * sizeof(real));
        if (s.n_waves)
            memcpy(grads[FREQUENCY] + (j * d + i) * s.n_waves, row + s.hidden[0], s.n_waves * sizeof(real));
    }
    for (i64 l = 1; l < s.n_layers; l++) {
        for (i64 i = 0; i < s.units[l - 1]; i++)
            memcpy(grads[LAYERS + 2 * l] + (j * s.units[l - 1] + i) * s.units[l], grad + s.weight[l] + i * s.hidden[l],
                   s.units[l] * sizeof(real));
        memcpy(grads[LAYERS + 2 * l + 1] + j * s.units[l], grad + s.bias[l], s.units[l] * sizeof(real));
    }
    for (i64 i = 0; i < s.width(); i++) grads[LOG_SCALE][j * s.width() + i] = grad[s.scale + s.place(i)];
    for (i64 c = 0; c < C && !s.same_classes; c++) {
        real *to = grads[MEAN] + j * (n + s.width()) * C + c;
        for (i64 i = 0; i < n; i++) to[i * C] = grad[s.mean_linear + c * s.in + i];
        for (i64 i = 0; i < s.width(); i++) to[(n + i) * C] = grad[s.mean + c * s.features + s.place(i)];
    }
    for (i64 o = 0; o < s.n_noises; o++)
        grads[LOG_NOISE][j * s.n_noises + o] =
            2 * elementary::exp(2 * tensors[LOG_NOISE][j * s.n_noises + o]) * grad[s.noise + o];
    for (i64 o = 1; o < C && grads[LOG_AMPLITUDE]; o++) grads[LOG_AMPLITUDE][j * (C - 1) + o - 1] = grad[s.amplitude + o];
    if (grads[LOG_CODE]) grads[LOG_CODE][j] = grad[s.code];
    if (grads[SURPRISE]) grads[SURPRISE][j] = grad[s.surprise];
}

// ---- factors of double precision ----------------------------------------------------------------

enum { VD = VECTOR_BYTES / sizeof(double) };
typedef double dvec __attribute__((vector_size(VECTOR_BYTES)));
static inline i64 pad_double(i64 n) { return (n + VD - 1) / VD * VD; }

template <int NV>
static inline void subtract_product(i64 begin, i64 end, const double *a, i64 stride, const double *B, i64 ld, double *row) {
    dvec acc[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) acc[v] = *(const dvec *)(row + v * VD);
    for (i64 p = begin; p < end; p++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) acc[v] -= a[p * stride] * *(const dvec *)(B + p * ld + v * VD);
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) *(dvec *)(row + v * VD) = acc[v];
}

// row[from:to] -= sum over p from begin to end of a[p * stride] B[p, from:to], in whole vectors
static inline void subtract_rows(i64 begin, i64 end, const double *a, i64 stride, const double *B, i64 ld, i64 from,
                                 i64 to, double *row) {
    for (i64 j = from / VD * VD; j < to; j += 4 * VD) {
        const i64 n = (to - j + VD - 1) / VD;
        const auto subtract = n >= 4   ? subtract_product<4>
                              : n == 3 ? subtract_product<3>
                              : n == 2 ? subtract_product<2>
                                       : subtract_product<1>;
        subtract(begin, end, a, stride, B + j, ld, row + j);
    }
}

// W = inverse of the lower Cholesky factor of the matrix in U, which becomes the upper one; NaN where
// it is not positive definite
static void invert_factor(i64 n, i64 ld, double *U, double *W) {
    memset(W, 0, n * ld * sizeof(double));
    for (i64 i = 0; i < n; i++) {
        double *row = U + i * ld, *w = W + i * ld;
        subtract_rows(0, i, U + i, ld, U, ld, i, n, row);
        double inverse = 1 / sqrt(row[i]);
        for (i64 j = i / VD * VD; j < n; j += VD) *(dvec *)(row + j) *= inverse;
        subtract_rows(0, i, U + i, ld, W, ld, 0, i, w);
        w[i] += 1;
        for (i64 j = 0; j <= i; j += VD) *(dvec *)(w + j) *= inverse;
    }
}

// out[i, :] = - sum of W_p' W_p over p from k to n, of which the first p + 1 entries are not 0
static void subtract_squares(i64 n, i64 k, i64 ld, const double *W, double *out) {
    for (i64 i = 0; i < n; i++) subtract_rows(i < k ? k : i, n, W + i, ld, W, ld, 0, n, out + i * ld);
}

static double dot(i64 n, const double *a, const double *b) { // of whole vectors
    dvec acc = {};
    for (i64 j = 0; j < n; j += VD) acc += *(const dvec *)(a + j) * *(const dvec *)(b + j);
    double total = 0;
    for (int t = 0; t < VD; t++) total += acc[t];
    return total;
}

// ---- batches of tasks --------------------------------------------------------------------------

struct Set {
    const void *X; // of float or double
    const real *y, *weight;
    const i64 *label, *index;
    i64 width;
};

struct Job {
    Shape shape;
    Set sets[2]; // support and query
    i64 n_tasks, n_rows, k, n_parts;
    bool X_is_double;
    const uint8_t *unseen; // by the member of each bit
    const double *center, *scale, *unit;
    const real *task_weight;
    real *theta, *grads; // packed: of each member, and of each part of its tasks
    real *outputs;
};

// a row of a task that is learned from, or whose output is asked for
struct Row {
    i64 task, number; // of the rows of the task, support rows first
    real weight, root; // `root` is a factor of its columns
};

struct Features {
    Row *rows;
    real *X, *S, *Z, *x[MAX_LAYERS], *z[MAX_LAYERS], *angle, *prior;
    void place(const Shape &s, i64 n, Arena &a) { // for n rows at a time
        rows = (Row *)a.take(n * (sizeof(Row) / sizeof(real)));
        X = a.take(n * s.in), S = a.take(n * s.columns), Z = a.take(n * s.features);
        for (i64 l = 0; l < s.n_layers; l++) {
            x[l] = a.take(n * s.hidden[l]);
            z[l] = keeps_input(s.act[l]) ? a.take(n * s.hidden[l]) : x[l];
        }
        angle = a.take(n * s.waves), prior = a.take(n * s.outputs);
    }
};

struct Space : Features {
    real *dx[MAX_LAYERS], *dprior, *dS, *dZ;
    real *turned, *gram, *A, *u, *du, *t, *expected, *v, *dv, *h;
    double *U, *W, *G, *r, *solved, *solved_support, *D, *vectors;
    void place(const Job &job, i64 n, Arena &a) { // for n rows at a time
        const Shape &s = job.shape;
        const i64 N = job.n_rows, square = N * pad(N);
        Features::place(s, n, a);
        for (i64 l = 0; l < s.n_layers; l++) dx[l] = a.take(n * s.hidden[l]);
        dprior = a.take(n * s.outputs), dS = a.take(n * s.columns), dZ = a.take(n * s.features);
        turned = a.take(s.columns * pad(N)), gram = a.take(square), A = a.take(square + N * s.outputs);
        u = a.take(N * s.outputs), du = a.take(N * s.outputs), t = a.take(N * s.outputs);
        expected = a.take(N * s.outputs);
        v = a.take(s.n_outputs * s.columns), dv = a.take(s.n_outputs * s.columns), h = a.take(s.n_outputs * s.columns);
        const i64 ratio = sizeof(double) / sizeof(real), ld = pad_double(N);
        U = (double *)a.take(ratio * N * ld), W = (double *)a.take(ratio * N * ld);
        G = (double *)a.take(ratio * N * ld), r = (double *)a.take(ratio * ld);
        solved = (double *)a.take(ratio * ld), solved_support = (double *)a.take(ratio * ld);
        if (s.likelihood) D = (double *)a.take(ratio * N * ld), vectors = (double *)a.take(ratio * N_VECTORS * ld);
    }
};

static real weight_of(const Job &job, i64 member, i64 task, i64 number) {
    const Set &set = job.sets[number >= job.sets[0].width];
    i64 at = task * set.width + number - (&set == job.sets ? 0 : job.sets[0].width);
    if (job.unseen && set.index && job.unseen[set.index[at]] >> member & 1) return 0;
    return set.weight ? set.weight[at] : 1;
}

static const Set &place_of(const Job &job, const Row &row, i64 &at) {
    const bool query = row.number >= job.sets[0].width;
    at = row.task * job.sets[query].width + row.number - (query ? job.sets[0].width : 0);
    return job.sets[query];
}

// where the output of a row goes, or null
static real *output_of(const Job &job, i64 member, const Row &row) {
    const i64 number = row.number - job.sets[0].width, width = job.sets[1].width;
    return number < 0 ? 0 : job.outputs + ((member * job.n_tasks + row.task) * width + number) * job.shape.n_outputs;
}

// a row of n features, standardised as far as there is a center
template <class Number>
static void standardise(const Job &job, i64 n, const Number *from, real *to) {
    const double beyond = job.shape.beyond;
    if (!job.center)
        for (i64 c = 0; c < n; c++) to[c] = (real)from[c];
    else
        for (i64 c = 0; c < n; c++) {
            double x = (from[c] - job.center[c]) / job.scale[c];
            x = x < -beyond ? -beyond : x;
            to[c] = (real)(x > beyond ? beyond : x);
        }
}

static void features(const Job &job, const real *theta, i64 n, Features &a) {
    const Shape &s = job.shape;
    const i64 d = s.n_inputs - 1;
    for (i64 i = 0; i < n; i++) {
        i64 at;
        const Set &set = place_of(job, a.rows[i], at);
        real *to = a.X + i * s.in;
        store(to + s.in - V, (vec){});
        to[0] = 1;
        if (job.X_is_double)
            standardise(job, d, (const double *)set.X + at * d, to + 1);
        else
            standardise(job, d, (const float *)set.X + at * d, to + 1);
    }
    Product q = {s.n_inputs, s.in, 1, s.first, {a.X, 0}, {theta + s.input, 0}, 0};
    multiply(n, s.n_linear, q, 0, 0, a.S, s.columns);
    q.b[0] += s.linear;
    multiply(n, s.units[0], q, 0, 0, a.z[0], s.hidden[0]);
    q.b[0] += s.hidden[0];
    if (s.n_waves) multiply(n, s.n_waves, q, 0, 0, a.angle, s.waves);
    for (i64 l = 0; l < s.n_layers; l++) {
        if (l) {
            Product p = {s.units[l - 1], s.hidden[l - 1], 1, s.hidden[l], {a.x[l - 1], 0}, {theta + s.weight[l], 0}, 0};
            multiply(n, s.units[l], p, theta + s.bias[l], 0, a.z[l], s.hidden[l]);
        }
        if (s.act[l] != IDENTITY) maps[s.act[l]].forward(n * s.hidden[l], s.slope, a.z[l], a.x[l]);
    }
    const real of_units = 2 / F(sqrt)((real)s.units[s.n_layers - 1]), of_waves = 1 / F(sqrt)((real)s.n_waves);
    for (i64 i = 0; i < n; i++) {
        real *Z = a.Z + i * s.features, *S = a.S + i * s.columns;
        const real *x = a.x[s.n_layers - 1] + i * s.last(), *angle = a.angle + i * s.waves;
        const real *e = theta + s.scale;
        for (i64 j = 0; j < s.last(); j++) Z[j] = of_units * x[j];
        real *cosine = Z + s.last(), *sine = cosine + s.waves;
        for (i64 j = 0; j < s.waves; j++) {
            real of_sine, of_cosine;
            elementary::sine_cosine(angle[j], of_sine, of_cosine);
            cosine[j] = of_waves * of_cosine, sine[j] = of_waves * of_sine;
        }
        vec root = splat(a.rows[i].root);
        for (i64 j = 0; j < s.linear; j += V) store(S + j, root * load(S + j));
        for (i64 j = 0; j < s.features; j += V) store(S + s.linear + j, root * load(e + j) * load(Z + j));
        for (i64 c = 0; c < s.n_outputs; c++)
            a.prior[i * s.outputs + c] =
                s.same_classes ? 0
                               : dot_rows(s.in, a.X + i * s.in, theta + s.mean_linear + c * s.in) +
                                     dot_rows(s.features, Z, theta + s.mean + c * s.features);
    }
}

// numbers: outputs of a task's n rows, the first k of which are given, and derivatives of the density of
// the others
static void numbers(const Job &job, i64 member, const real *theta, i64 first, i64 n, i64 k, Space &a, real *grad) {
    const Shape &s = job.shape;
    const Row *rows = a.rows + first;
    const i64 m = grad ? n : k, pm = pad(m), ld = pad_double(m); // rows of the system
    const real *S = a.S + first * s.columns, *prior = a.prior + first * s.outputs;
    const real g = grad ? job.task_weight[rows[0].task] : 0;
    transpose<true>(m, s.columns, S, s.columns, a.turned, pm);
    multiply(n, m, {s.columns, s.columns, 1, pm, {S, 0}, {a.turned, 0}, 0}, 0, 0, a.gram, pm);
    real missing = 0, real_rows = 0; // of the query rows: 1 less the weight, and the weights
    for (i64 i = k; i < n; i++) missing += 1 - rows[i].weight, real_rows += rows[i].weight;
    memset(a.A, 0, m * pm * sizeof(real));
    for (i64 o = 0; o < s.n_outputs; o++) {
        const double noise = theta[s.noise + o];
        const real amplitude = theta[s.amplitude + o];
        memset(a.r, 0, ld * sizeof(double)), memset(a.solved, 0, ld * sizeof(double));
        memset(a.solved_support, 0, ld * sizeof(double));
        for (i64 i = 0; i < m; i++) {
            for (i64 j = 0; j < ld; j++) a.U[i * ld + j] = a.gram[i * pm + j];
            a.U[i * ld + i] += noise;
            i64 at;
            const Set &set = place_of(job, rows[i], at);
            a.r[i] = rows[i].root * (set.y[at * s.n_outputs + o] / amplitude - prior[i * s.outputs + o]);
        }
        invert_factor(m, ld, a.U, a.W);
        for (i64 p = 0; p < m; p++) {
            const double *w = a.W + p * ld, z = dot(p + 1, w, a.r);
            double *to = p < k ? a.solved_support : a.solved; // the latter: what query rows add
            for (i64 j = 0; j <= p; j += VD) *(dvec *)(to + j) += z * *(const dvec *)(w + j);
        }
        for (i64 i = k; i < n; i++) {
            real *to = output_of(job, member, rows[i]), moved = 0;
            for (i64 j = 0; j < k; j++) moved += a.gram[i * pm + j] * (real)a.solved_support[j];
            if (to) to[o] = amplitude * (prior[i * s.outputs + o] + moved / rows[i].root);
        }
        if (!grad) continue;
        memset(a.G, 0, n * ld * sizeof(double));
        subtract_squares(n, k, ld, a.W, a.G);
        double trace = 0, by_amplitude = 0;
        for (i64 i = 0; i < n; i++) {
            const double one = a.solved[i], both = one + a.solved_support[i];
            for (i64 j = 0; j < n; j++) { // twice the derivative
                double value = -a.G[i * ld + j] - both * a.solved[j] - one * a.solved_support[j];
                if (j == i) trace += value;
                a.A[i * pm + j] += g * (real)value;
            }
            a.dprior[(first + i) * s.outputs + o] = -g * rows[i].root * (real)one;
            by_amplitude -= one * (a.r[i] + rows[i].root * prior[i * s.outputs + o]);
        }
        grad[s.noise + o] += g * (real)(0.5 * (trace - missing / noise));
        grad[s.amplitude + o] += g * ((real)by_amplitude + real_rows);
    }
    if (grad)
        multiply(n, s.columns, {n, pm, 1, s.columns, {a.A, 0}, {S, 0}, 0}, 0, 0, a.dS + first * s.columns, s.columns);
}

// out[n, n_outputs] = K x, for a symmetric K
static void times_inverse(i64 n, i64 ld, const double *K, i64 n_outputs, i64 stride, const real *x, real *out) {
    for (i64 i = 0; i < n; i++)
        for (i64 c = 0; c < n_outputs; c++) {
            double total = 0;
            for (i64 j = 0; j < n; j++) total += K[i * ld + j] * x[j * stride + c];
            out[i * stride + c] = (real)total;
        }
}

// probabilities of n classes
static void softmax(i64 n, const real *logits, real *out) {
    real top = -INFINITY, norm = 0;
    for (i64 c = 0; c < n; c++) top = logits[c] > top ? logits[c] : top;
    for (i64 c = 0; c < n; c++) norm += out[c] = elementary::exp(logits[c] - top);
    for (i64 c = 0; c < n; c++) out[c] /= norm;
}

// classes: outputs, which are logits, conditioned on codes of the classes, and derivatives of the
// cross-entropy
static void classes(const Job &job, i64 member, const real *theta, i64 first, i64 n, i64 k, Space &a, real *grad) {
    const Shape &s = job.shape;
    const Row *rows = a.rows + first;
    const i64 C = s.n_outputs, cp = s.outputs, pk = pad(k), ld = pad_double(k), m = n - k;
    const real *S = a.S + first * s.columns, *S_query = S + k * s.columns;
    const real size = theta[s.code], surprise = theta[s.surprise], even = (real)1 / s.n_outputs;
    const real g = grad ? job.task_weight[rows[0].task] : 0;
    real *dS = a.dS + first * s.columns, *prior = a.prior + first * cp, *dprior = a.dprior + first * cp;
    if (k) {
        transpose<true>(k, s.columns, S, s.columns, a.turned, pk);
        multiply(k, k, {s.columns, s.columns, 1, pk, {S, 0}, {a.turned, 0}, 0}, 0, 0, a.gram, pk);
        for (i64 i = 0; i < k; i++) {
            for (i64 j = 0; j < ld; j++) a.U[i * ld + j] = j < pk ? a.gram[i * pk + j] : 0;
            a.U[i * ld + i] += theta[s.noise];
            i64 at;
            const Set &set = place_of(job, rows[i], at);
            real *expected = a.expected + i * cp;
            softmax(C, prior + i * cp, expected);
            for (i64 c = 0; c < C; c++) {
                real code = size * ((real)(set.label[at] == c) - even - surprise * (expected[c] - even));
                a.t[i * cp + c] = rows[i].root * (code - prior[i * cp + c]);
            }
        }
        invert_factor(k, ld, a.U, a.W);
        memset(a.G, 0, k * ld * sizeof(double));
        subtract_squares(k, 0, ld, a.W, a.G);
        for (i64 i = 0; i < k * ld; i++) a.G[i] = -a.G[i];
        times_inverse(k, ld, a.G, C, cp, a.t, a.u);
        multiply(C, s.columns, {k, 1, cp, s.columns, {a.u, 0}, {S, 0}, 0}, 0, 0, a.v, s.columns);
    }
    for (i64 i = k; i < n; i++) {
        i64 at;
        const Set &set = place_of(job, rows[i], at);
        real *logits = prior + i * cp, *d = dprior + i * cp, *to = output_of(job, member, rows[i]);
        for (i64 c = 0; c < C && k; c++)
            logits[c] += dot_rows(s.columns, S + i * s.columns, a.v + c * s.columns) / rows[i].root;
        softmax(C, logits, d);
        for (i64 c = 0; c < C; c++) d[c] = g * rows[i].weight * (d[c] - (real)(set.label[at] == c));
        if (to) memcpy(to, logits, C * sizeof(real));
    }
    if (!grad) return;
    if (!k) {
        memset(dS, 0, n * s.columns * sizeof(real));
        return;
    }
    real *D = a.A; // derivatives of the query rows, by how far they moved
    for (i64 i = 0; i < m; i++)
        for (i64 c = 0; c < C; c++) D[i * cp + c] = dprior[(k + i) * cp + c] / rows[k + i].root;
    multiply(m, s.columns, {C, cp, 1, s.columns, {D, 0}, {a.v, 0}, 0}, 0, 0, dS + k * s.columns, s.columns);
    multiply(C, s.columns, {m, 1, cp, s.columns, {D, 0}, {S_query, 0}, 0}, 0, 0, a.dv, s.columns);
    for (i64 i = 0; i < k; i++)
        for (i64 c = 0; c < C; c++) a.du[i * cp + c] = dot_rows(s.columns, S + i * s.columns, a.dv + c * s.columns);
    times_inverse(k, ld, a.G, C, cp, a.du, a.t);
    multiply(C, s.columns, {k, 1, cp, s.columns, {a.t, 0}, {S, 0}, 0}, 0, 0, a.h, s.columns);
    for (i64 i = 0; i < C * s.columns; i += V) store(a.dv + i, load(a.dv + i) - load(a.h + i));
    double by_noise = 0, by_code = 0, by_surprise = 0;
    for (i64 i = 0; i < k; i++) {
        i64 at;
        const Set &set = place_of(job, rows[i], at);
        const real *expected = a.expected + i * cp;
        real mean = 0;
        for (i64 c = 0; c < C; c++) mean += a.t[i * cp + c] * expected[c];
        for (i64 c = 0; c < C; c++) {
            const real t = a.t[i * cp + c], by_target = t * rows[i].root * size, more = expected[c] - even;
            by_noise -= t * a.u[i * cp + c];
            by_code += by_target * ((real)(set.label[at] == c) - even - surprise * more);
            by_surprise -= by_target * more;
            dprior[i * cp + c] = -rows[i].root * (t + surprise * size * expected[c] * (t - mean));
            a.t[i * cp + c] = -t;
        }
    }
    grad[s.noise] += (real)by_noise;
    grad[s.code] += (real)by_code;
    grad[s.surprise] += (real)by_surprise;
    multiply(k, s.columns, {C, cp, 1, s.columns, {a.u, a.t}, {a.dv, a.v}, 0}, 0, 0, dS, s.columns);
}

// The support rows of a task in the coordinates u of rows, w = S'u, where u = - w l'(s) is the mode
// for the outputs s = G u beside the prior mean; see `_Dual` of learners/laplace.py.
struct Newton {
    i64 k, ld;
    double *G, *U, *W, *root, *t; // Gram matrix, system I + R G R and inverse of its factor

    void times_gram(const double *v, double *out) const {
        for (i64 i = 0; i < k; i++) out[i] = dot(k, G + i * ld, v);
    }
    void factorise() const {
        for (i64 i = 0; i < k; i++) {
            for (i64 j = 0; j < k; j++) U[i * ld + j] = root[i] * G[i * ld + j] * root[j];
            for (i64 j = k; j < ld; j++) U[i * ld + j] = 0;
            U[i * ld + i] += 1;
        }
        invert_factor(k, ld, U, W);
    }
    // out = K v, for K = R inv(I + R G R) R; not in place
    void times_precision(const double *v, double *out) const {
        memset(t, 0, ld * sizeof(double)), memset(out, 0, ld * sizeof(double));
        for (i64 i = 0; i < k; i++) t[i] = root[i] * v[i];
        for (i64 p = 0; p < k; p++) {
            const double *w = W + p * ld, z = dot(p + 1, w, t);
            for (i64 j = 0; j <= p; j += VD) *(dvec *)(out + j) += z * *(const dvec *)(w + j);
        }
        for (i64 i = 0; i < k; i++) out[i] *= root[i];
    }
    // moment becomes what solves (I + R R G) u = moment; `spare` is overwritten
    void solve(double *moment, double *spare, double *out) const {
        factorise();
        times_gram(moment, spare);
        times_precision(spare, out);
        for (i64 i = 0; i < k; i++) moment[i] -= out[i];
    }
};

enum { MOST_STEPS = 50, MOST_HALVINGS = 20 };
const double NEAR = 1e-6, FAR = 3; // change of outputs at a mode; standard deviations

// The mode of the posterior of one output, given k rows, and what there is at it.
struct Mode {
    Newton support;
    Likelihood likelihood;
    double amplitude;
    const Row *rows;
    const real *prior; // of the output: every `stride`-th number is that of a row
    i64 stride;
    double *y, *u, *at, *slope, *info, *step, *moved, *spare, *other; // u, the outputs, derivatives of rows there, ...

    Mode(i64 k, i64 ld, double *G, double *U, double *W, double *vectors) { // N_VECTORS of ld numbers, which become 0
        memset(vectors, 0, N_VECTORS * ld * sizeof(double));
        double **const of[] = {&y, &u, &at, &slope, &info, &step, &moved, &spare, &other, &support.root, &support.t};
        for (double **vector : of) *vector = vectors, vectors += ld;
        support.k = k, support.ld = ld, support.G = G, support.U = U, support.W = W;
    }
    double output(i64 i) const { return amplitude * (prior[i * stride] + at[i]); }
    // also the derivatives of rows
    double objective() const {
        double total = 0;
        for (i64 i = 0; i < support.k; i++) {
            const Local row = likelihood.at(output(i), y[i]);
            slope[i] = amplitude * row.first, info[i] = amplitude * amplitude * row.second;
            total += rows[i].weight * row.value + 0.5 * u[i] * at[i];
        }
        return total;
    }
    void take_roots(const double *information) const {
        for (i64 i = 0; i < support.k; i++) support.root[i] = sqrt(rows[i].weight * fmax(information[i], DBL_MIN));
    }
    void towards(const double *information) const { // step and moved: all the way there
        for (i64 i = 0; i < support.k; i++) step[i] = rows[i].weight * (information[i] * at[i] - slope[i]);
        take_roots(information);
        support.solve(step, spare, moved);
        for (i64 i = 0; i < support.k; i++) step[i] -= u[i];
        support.times_gram(step, moved);
    }
    void go(double part) const {
        for (i64 i = 0; i < support.k; i++) u[i] += part * step[i], at[i] += part * moved[i];
    }
    // returns the objective; the system is that of the information at the mode, with its factor
    double find() const {
        const i64 k = support.k;
        for (i64 i = 0; i < k; i++) { // from what the targets alone would suggest, but not from far away
            double aim, variance;
            likelihood.guess(y[i], aim, variance);
            variance /= amplitude * amplitude;
            const double far = FAR * sqrt(support.G[i * support.ld + i] + variance);
            aim = fmin(fmax(aim / amplitude - prior[i * stride], -far), far);
            info[i] = 1 / variance, u[i] = rows[i].weight * aim / variance;
        }
        take_roots(info);
        support.solve(u, spare, step);
        support.times_gram(u, at);
        double value = objective();
        for (i64 steps = 0, near = !k; steps < MOST_STEPS && !near; steps++) {
            towards(info);
            double farthest = 0;
            for (i64 i = 0; i < k; i++) farthest = fmax(farthest, fabs(moved[i]));
            near = farthest < NEAR;
            for (i64 halvings = 0;; halvings++) {
                go(1);
                const double now = objective();
                if (near || now <= value || halvings == MOST_HALVINGS) {
                    value = now;
                    break;
                }
                go(-1);
                if (likelihood.kind == HEAVY_TAILS && !halvings) { // a step that is never too long
                    objective();
                    for (i64 i = 0; i < k; i++) other[i] = amplitude * amplitude * likelihood.bound(output(i), y[i]);
                    towards(other);
                    continue;
                }
                for (i64 i = 0; i < k; i++) step[i] /= 2, moved[i] /= 2;
            }
        }
        take_roots(info);
        support.factorise();
        return value;
    }
};

// likelihoods that take Newton steps to the mode of the posterior: as `numbers`. The derivative of
// what query rows have to do with a mode is that of the equation of the mode.
static void newton(const Job &job, i64 member, const real *theta, i64 first, i64 n, i64 k, Space &a, real *grad) {
    const Shape &s = job.shape;
    const Row *rows = a.rows + first;
    const i64 pn = pad(n), ld = pad_double(n), C = s.n_outputs;
    const real *S = a.S + first * s.columns, *prior = a.prior + first * s.outputs;
    const double g = grad ? job.task_weight[rows[0].task] : 0;
    Mode mode(k, ld, a.D, a.U, a.W, a.vectors);
    const Newton &support = mode.support;
    double *y = mode.y, *u = mode.u, *at = mode.at, *slope = mode.slope, *info = mode.info, *step = mode.step;
    double *moved = mode.moved, *spare = mode.spare, *by_info = mode.other, *by_u = a.vectors + (N_VECTORS - 1) * ld;
    if (k) {
        transpose<true>(n, s.columns, S, s.columns, a.turned, pn);
        multiply(k, n, {s.columns, s.columns, 1, pn, {S, 0}, {a.turned, 0}, 0}, 0, 0, a.gram, pn);
    }
    for (i64 i = 0; i < k; i++)
        for (i64 j = 0; j < ld; j++) a.D[i * ld + j] = j < k ? a.gram[i * pn + j] : 0;
    if (grad) memset(a.A, 0, n * pn * sizeof(real));
    mode.rows = rows, mode.stride = s.outputs;
    for (i64 o = 0; o < C; o++) {
        const double amplitude = theta[s.amplitude + o], noise = theta[s.noise + o];
        const Likelihood likelihood = {s.likelihood, noise * amplitude * amplitude, job.unit[o], s.delta};
        for (i64 i = 0; i < n; i++) {
            i64 place;
            const Set &set = place_of(job, rows[i], place);
            y[i] = set.y[place * C + o];
        }
        mode.likelihood = likelihood, mode.amplitude = amplitude, mode.prior = prior + o;
        mode.find();
        double by_amplitude = 0, by_dispersion = 0;
        memset(by_u, 0, ld * sizeof(double)), memset(by_info, 0, ld * sizeof(double));
        for (i64 q = k; q < n; q++) {
            double *cross = step, *V = moved;
            double mean = prior[q * s.outputs + o];
            double variance = dot_rows(s.columns, S + q * s.columns, S + q * s.columns);
            for (i64 i = 0; i < k; i++) cross[i] = a.gram[i * pn + q], mean += cross[i] * u[i];
            support.times_precision(cross, V);
            for (i64 i = 0; i < k; i++) variance -= cross[i] * V[i];
            const bool clamped = variance < 0;
            if (clamped) variance = 0;
            const Told told = likelihood.told(amplitude * mean, amplitude * amplitude * variance, y[q]);
            real *to = output_of(job, member, rows[q]);
            if (to) to[o] = (real)told.output;
            if (!grad) continue;
            const double factor = g * rows[q].weight, by_mean = factor * amplitude * told.by_mean;
            const double by_variance = clamped ? 0 : factor * amplitude * amplitude * told.by_variance;
            by_amplitude += factor * (mean * told.by_mean + 2 * amplitude * variance * told.by_variance);
            by_dispersion += factor * told.by_dispersion;
            a.dprior[(first + q) * s.outputs + o] = (real)by_mean;
            support.times_gram(V, spare);
            for (i64 i = 0; i < k; i++) {
                const double left = cross[i] - spare[i]; // covariance of the outputs of both rows, given all
                by_u[i] += by_mean * cross[i];
                by_info[i] -= rows[i].weight * by_variance * left * left;
                const real by_cross = (real)(by_mean * u[i] - 2 * by_variance * V[i]);
                a.A[i * pn + q] += by_cross, a.A[q * pn + i] += by_cross;
                for (i64 j = 0; j < k; j++) a.A[i * pn + j] += (real)(2 * by_variance * V[i] * V[j]);
            }
            a.A[q * pn + q] += (real)(2 * by_variance);
        }
        if (!grad) continue;
        // by the outputs of support rows, as if they were free, and then as they depend on each other
        double *by_output = slope, *lambda = step;
        for (i64 i = 0; i < k; i++) {
            const Local row = likelihood.at(amplitude * (prior[i * s.outputs + o] + at[i]), y[i]);
            const double cube = amplitude * amplitude * amplitude;
            by_output[i] = cube * row.third * by_info[i] - rows[i].weight * info[i] * by_u[i];
        }
        support.times_gram(by_output, spare);
        support.times_precision(spare, lambda);
        for (i64 i = 0; i < k; i++) lambda[i] = by_output[i] - lambda[i];
        support.times_gram(lambda, spare);
        for (i64 i = 0; i < k; i++) {
            const double output = prior[i * s.outputs + o] + at[i]; // without the amplitude
            const Local row = likelihood.at(amplitude * output, y[i]);
            const double by_slope = -rows[i].weight * (by_u[i] + spare[i]);
            by_amplitude += by_slope * (row.first + amplitude * output * row.second);
            by_amplitude += by_info[i] * amplitude * (2 * row.second + amplitude * output * row.third);
            by_dispersion += amplitude * (by_slope * row.first_by + by_info[i] * amplitude * row.second_by);
            a.dprior[(first + i) * s.outputs + o] = (real)lambda[i];
            for (i64 j = 0; j < k; j++) a.A[i * pn + j] += (real)(lambda[i] * u[j] + u[i] * lambda[j]);
        }
        grad[s.noise + o] += (real)(amplitude * amplitude * by_dispersion);
        grad[s.amplitude + o] += (real)(amplitude * (by_amplitude + 2 * amplitude * noise * by_dispersion));
    }
    if (grad)
        multiply(n, s.columns, {n, pn, 1, s.columns, {a.A, 0}, {S, 0}, 0}, 0, 0, a.dS + first * s.columns, s.columns);
}

// adds to grad what the first n rows say, whose derivatives by their columns and means are known
static void backward(const Job &job, const real *theta, i64 n, Space &a, real *grad) {
    const Shape &s = job.shape;
    const real *e = theta + s.scale;
    const real of_units = 2 / F(sqrt)((real)s.units[s.n_layers - 1]);
    for (i64 i = 0; i < n; i++) {
        const real *S = a.S + i * s.columns + s.linear;
        real *linear = a.dS + i * s.columns, *dS = linear + s.linear, *dZ = a.dZ + i * s.features;
        vec root = splat(a.rows[i].root);
        for (i64 j = 0; j < s.linear; j += V) store(linear + j, root * load(linear + j));
        for (i64 j = 0; j < s.features; j += V) {
            real *by_scale = grad + s.scale + j;
            store(by_scale, load(by_scale) + load(dS + j) * load(S + j));
            vec total = root * load(e + j) * load(dS + j);
            for (i64 c = 0; c < s.n_outputs && !s.same_classes; c++)
                total += a.dprior[i * s.outputs + c] * load(theta + s.mean + c * s.features + j);
            store(dZ + j, total);
        }
        for (i64 j = 0; j < s.last(); j += V) store(a.dx[s.n_layers - 1] + i * s.last() + j, of_units * load(dZ + j));
        const real *cosine = a.Z + i * s.features + s.last(), *sine = cosine + s.waves;
        const real *by_cosine = dZ + s.last(), *by_sine = by_cosine + s.waves;
        for (i64 j = 0; j < s.waves; j += V)
            store(a.angle + i * s.waves + j, load(cosine + j) * load(by_sine + j) - load(sine + j) * load(by_cosine + j));
    }
    if (!s.same_classes) {
        Product q = {n, 1, s.outputs, s.features, {a.dprior, 0}, {a.Z, 0}, 0};
        multiply(s.n_outputs, s.features, q, grad + s.mean, s.features, grad + s.mean, s.features);
        q.b[0] = a.X, q.ldb = s.in;
        multiply(s.n_outputs, s.n_inputs, q, grad + s.mean_linear, s.in, grad + s.mean_linear, s.in);
    }
    for (i64 l = s.n_layers - 1; l >= 0; l--) {
        real *dz = a.dx[l];
        if (s.act[l] != IDENTITY) maps[s.act[l]].scale(n * s.hidden[l], s.slope, a.z[l], a.x[l], dz, dz);
        if (!l) break;
        Product q = {n, 1, s.hidden[l - 1], s.hidden[l], {a.x[l - 1], 0}, {dz, 0}, 0};
        real *to = grad + s.weight[l], *bias = grad + s.bias[l];
        multiply(s.units[l - 1], s.units[l], q, to, s.hidden[l], to, s.hidden[l]);
        for (i64 j = 0; j < s.hidden[l]; j += V) {
            vec total = load(bias + j);
            for (i64 i = 0; i < n; i++) total += load(dz + i * s.hidden[l] + j);
            store(bias + j, total);
        }
        multiply(n, s.units[l - 1], {s.units[l], s.hidden[l], 1, s.hidden[l - 1], {dz, 0}, {theta + s.turned[l], 0}, 0}, 0, 0,
                 a.dx[l - 1], s.hidden[l - 1]);
    }
    Product q = {n, 1, s.in, s.columns, {a.X, 0}, {a.dS, 0}, 0};
    real *to = grad + s.input;
    multiply(s.n_inputs, s.n_linear, q, to, s.first, to, s.first);
    to += s.linear, q.b[0] = a.dx[0], q.ldb = s.hidden[0];
    multiply(s.n_inputs, s.units[0], q, to, s.first, to, s.first);
    to += s.hidden[0], q.b[0] = a.angle, q.ldb = s.waves;
    if (s.n_waves) multiply(s.n_inputs, s.n_waves, q, to, s.first, to, s.first);
}

static bool run_part(const void *p, i64 part, Arena &arena) {
    const Job &job = *(const Job *)p;
    const Shape &s = job.shape;
    const i64 member = part / job.n_parts, number = part % job.n_parts, N = job.n_rows;
    const i64 begin = number * job.n_tasks / job.n_parts, end = (number + 1) * job.n_tasks / job.n_parts;
    const i64 at_a_time = N < ROWS_AT_A_TIME ? ROWS_AT_A_TIME / N : 1;
    Space a;
    arena.measures = true, arena.used = 0;
    a.place(job, at_a_time * N, arena);
    if (!arena.reserve()) return false;
    a.place(job, at_a_time * N, arena);
    const real *theta = job.theta + member * s.size_with_turned;
    real *grad = job.task_weight ? job.grads + part * s.size : 0;
    if (grad) memset(grad, 0, s.size * sizeof(real));
    for (i64 from = begin; from < end; from += at_a_time) {
        const i64 to = from + at_a_time < end ? from + at_a_time : end;
        i64 used = 0, all, starts[ROWS_AT_A_TIME + 1], given[ROWS_AT_A_TIME];
        for (i64 t = from; t < to; t++) {
            starts[t - from] = used, given[t - from] = 0;
            for (i64 i = 0; i < N; i++) {
                real weight = weight_of(job, member, t, i);
                // Newton steps have the weights beside the columns: what rows tell depends on outputs
                const bool asked = s.likelihood && i >= job.sets[0].width;
                if (!(weight > 0 || asked)) continue;
                a.rows[used++] = {t, i, weight, s.likelihood ? 1 : F(sqrt)(weight)};
                given[t - from] += i < job.k;
            }
        }
        starts[to - from] = all = used;
        for (i64 t = from; t < to; t++)
            for (i64 i = job.sets[0].width; i < N && !s.likelihood; i++)
                if (!(weight_of(job, member, t, i) > 0)) a.rows[all++] = {t, i, 0, 0};
        features(job, theta, all, a);
        for (i64 t = from; t < to; t++) {
            const i64 first = starts[t - from], n = starts[t - from + 1] - first;
            const auto condition = s.likelihood ? newton : s.classes ? classes : numbers;
            if (n) condition(job, member, theta, first, n, given[t - from], a, grad);
        }
        for (i64 i = used; i < all; i++)
            for (i64 c = 0; c < s.n_outputs; c++)
                output_of(job, member, a.rows[i])[c] = theta[s.amplitude + c] * a.prior[i * s.outputs + c];
        if (grad) backward(job, theta, used, a, grad);
    }
    return true;
}

static thread_local Arena packed_of_thread;

} // namespace

bool HEAD(step, LEVEL, REAL)(const int64_t *given) {
    using namespace head;
    Job job;
    Shape &s = job.shape;
    describe((const i64 *)given[head::SIZES], (const double *)given[NUMBERS], s);
    for (int i = 0; i < 2; i++) {
        const i64 *from = given + (i ? head::QUERY_X : head::SUPPORT_X);
        const void *y = (const void *)from[1];
        job.sets[i] = {(const void *)from[0], s.classes ? 0 : (const real *)y, (const real *)from[2],
                       s.classes ? (const i64 *)y : 0, (const i64 *)from[3], from[4]};
    }
    job.n_tasks = given[head::N_TASKS], job.k = given[N_GIVEN];
    job.X_is_double = given[X_IS_DOUBLE];
    job.n_rows = job.sets[0].width + job.sets[1].width;
    job.unseen = (const uint8_t *)given[UNSEEN];
    job.center = (const double *)given[CENTER], job.scale = (const double *)given[SCALE];
    job.unit = (const double *)given[UNIT];
    job.task_weight = (const real *)given[TASK_WEIGHT], job.outputs = (real *)given[head::OUTPUTS];
    job.n_parts = (job.n_tasks + TASKS_PER_PART - 1) / TASKS_PER_PART;
    job.n_parts = job.n_parts > MAX_PARTS ? MAX_PARTS : job.n_parts < 1 ? 1 : job.n_parts;
    const real *const *tensors = (const real *const *)given[head::THETA];
    Arena &arena = packed_of_thread;
    const i64 n_thetas = s.n_members * s.size_with_turned;
    const i64 n_grads = job.task_weight ? s.n_members * job.n_parts * s.size : 0;
    arena.measures = true, arena.used = 0;
    arena.take(n_thetas + n_grads);
    if (!arena.reserve()) return false;
    job.theta = arena.take(n_thetas + n_grads), job.grads = job.theta + n_thetas;
    memset(job.theta, 0, n_thetas * sizeof(real));
    for (i64 j = 0; j < s.n_members; j++) pack(s, tensors, j, job.theta + j * s.size_with_turned);
    bool done = run_blocks(&job, s.n_members * job.n_parts, run_part, given[head::N_THREADS]);
    for (i64 j = 0; j < s.n_members && done && n_grads; j++) {
        real *total = job.grads + j * job.n_parts * s.size;
        for (i64 b = 1; b < job.n_parts; b++)
            for (i64 i = 0; i < s.size; i += V) store(total + i, load(total + i) + load(total + b * s.size + i));
        unpack(s, total, tensors, j, (real *const *)given[head::GRADS]);
    }
    if (arena.size > KEPT_BYTES) arena.release();
    return done;
}

#if REAL_IS_DOUBLE
#include "posterior.h"
#endif
