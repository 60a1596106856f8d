// Meta-gradients, adaptation and prediction of multilayer perceptrons, one task at a time.
//
// A task's parameters, activations and gradients stay in the processor's caches, so nothing is
// batched over tasks; threads take blocks of tasks. The outer gradient is the reverse sweep
//
//     v <- grad L_query(theta_K);   v <- v - H_k (rate * v)   for k = K-1, ..., 0
//
// (Finn et al. 2017, eq. 1, differentiated), with the Hessian-vector product H_k u by
// differentiating the gradient computation along u (Pearlmutter 1994).
//
// Compiled once for each number type (REAL) and instruction set (LEVEL); see setup.py. Whatever is
// compiled here stays here: were it shared, the linker might take another instruction set's.

#include "products.h"

#include "activations.h"
#include "blocks.h"

namespace {

enum { TASKS_PER_BLOCK = 8, MAX_BLOCKS = 32 };

// A B^T of matrices with few rows in B: products of rows, without their padding, which is 0 only as
// long as everything is finite (0 * inf is not)
enum { FEW = V < 4 ? V : 4 }; // one vector of results
static void multiply_rows(i64 m, i64 n, i64 k, const Product &q, const real *init, i64 ldi, real *c, i64 ldc) {
    const i64 last = pad(k) - V;
    lanes used;
    for (int t = 0; t < V; t++) used[t] = last + t < k ? -1 : 0;
    for (i64 i = 0; i < m; i++) {
        vec out = init ? load(init + i * ldi) : (vec){};
        for (i64 j = 0; j < n; j++) {
            vec acc = {};
            for (int s = 0; s < 2 && q.a[s]; s++) {
                const real *a = q.a[s] + i * q.rs, *b = q.b[s] + j * q.ldb;
                for (i64 p = 0; p < last; p += V) acc += load(a + p) * load(b + p);
                acc += (vec)((lanes)load(a + last) & used) * (vec)((lanes)load(b + last) & used);
            }
            out[j] += sum(acc);
        }
        store(c + i * ldc, out);
    }
}

// ---- losses of numbers -------------------------------------------------------------------------

// in the order of LOSSES of engine/rungs/native.py
enum LossOfRow { SQUARED_ERROR, CROSS_ENTROPY, ABSOLUTE_ERROR, HUBER, QUANTILE, POISSON, GAMMA, BINARY, N_LOSSES };

// each returns the value, and sets the first and the second derivative by the output
struct SquaredError {
    static inline real at(real o, real y, real, real &d1, real &d2) {
        real e = o - y;
        d1 = 2 * e, d2 = 2;
        return e * e;
    }
};
struct AbsoluteError {
    static inline real at(real o, real y, real, real &d1, real &d2) {
        real e = o - y;
        d1 = e > 0 ? 1 : e < 0 ? -1 : e; // NaN stays
        d2 = 0 * e;
        return F(__builtin_fabs)(e);
    }
};
struct Huber {
    static inline real at(real o, real y, real a, real &d1, real &d2) {
        real e = o - y;
        d1 = e > a ? a : e < -a ? -a : e;
        d2 = F(__builtin_fabs)(e) <= a;
        return d1 * (e - (real)0.5 * d1);
    }
};
struct Quantile {
    static inline real at(real o, real y, real a, real &d1, real &d2) {
        real value = AbsoluteError::at(o, y, a, d1, d2), tilt = a - (real)0.5;
        d1 = (real)0.5 * d1 - tilt;
        return (real)0.5 * value + tilt * (y - o);
    }
};
struct Poisson { // half of the deviance, of the logarithm of the rate
    static inline real at(real o, real y, real, real &d1, real &d2) {
        d2 = elementary::exp(o);
        d1 = d2 - y;
        return d1 - y * (y == 0 ? o : o - F(log)(y));
    }
};
struct Gamma { // likewise, of the logarithm of the mean
    static inline real at(real o, real y, real, real &d1, real &d2) {
        d2 = y * elementary::exp(-o);
        d1 = 1 - d2;
        return o - F(log)(y) - d1;
    }
};
struct Binary { // of logits
    static inline real at(real o, real y, real, real &d1, real &d2) {
        real e = elementary::exp(o < 0 ? o : -o), p = (o < 0 ? e : 1) / (1 + e);
        d1 = p - y;
        d2 = e / ((1 + e) * (1 + e));
        return (o > 0 ? o : 0) + elementary::log1p_of_unit(e) - y * o;
    }
};

// ---- the network -------------------------------------------------------------------------------

struct Layer {
    i64 in, out, act, ip, op; // sizes, and padded sizes
    real slope;
    bool has_bias, by_input; // by_input: weights are kept as [in, out padded], else [out, in padded]
    i64 weight, bias;        // offsets in packed parameters
    i64 turned;              // offset of the transposed weights, beside them
};
struct Net {
    i64 n_layers, packed, turned, scratch; // sizes of packed parameters, their transposes, a transpose
    i64 loss;
    real parameter; // of the loss
    bool classes;
    Layer layer[MAX_LAYERS];
    const Layer &last() const { return layer[n_layers - 1]; }
};

static i64 weight_rows(const Layer &l) { return l.by_input ? l.in : l.out; }
static i64 weight_stride(const Layer &l) { return l.by_input ? l.op : l.ip; }

// `first_by_input`: the first layer has that layout in any case
static void lay_out(Net &net, bool first_by_input) {
    net.scratch = 0;
    i64 at = 0, turned = 0;
    for (i64 l = 0; l < net.n_layers; l++) {
        Layer &y = net.layer[l];
        y.ip = pad(y.in), y.op = pad(y.out);
        // the layout with less padding
        y.by_input = y.in * y.op <= y.out * y.ip || (first_by_input && !l);
        y.weight = at, at += weight_rows(y) * weight_stride(y);
        y.bias = at, at += y.op;
        y.turned = turned, turned += (y.by_input ? y.out : y.in) * pad(weight_rows(y));
        if (y.by_input && y.out * y.ip > net.scratch) net.scratch = y.out * y.ip;
    }
    net.packed = at;
    net.turned = turned;
}

// sizes: n_layers, the loss, then (in, out, activation, has_bias) of each layer; the parameter of
// the loss follows the slopes, and the norm that gradients are clipped to
static void describe(const i64 *sizes, const double *slopes, bool first_by_input, Net &net) {
    net.n_layers = sizes[0];
    net.loss = sizes[1];
    net.parameter = (real)slopes[net.n_layers];
    net.classes = net.loss == CROSS_ENTROPY;
    for (i64 l = 0; l < net.n_layers; l++) {
        const i64 *s = sizes + 2 + 4 * l;
        Layer &y = net.layer[l];
        y.in = s[0], y.out = s[1], y.act = s[2], y.has_bias = s[3];
        y.slope = (real)slopes[l];
    }
    lay_out(net, first_by_input);
}

// Natural tensors (weight and bias of each layer in turn) <-> packed; null ones are left alone
static void pack(const Net &net, const real *const *tensors, real *out) {
    for (i64 l = 0; l < net.n_layers; l++) {
        const Layer &y = net.layer[l];
        const real *w = tensors[2 * l], *b = tensors[2 * l + 1];
        if (w && y.by_input)
            transpose<false>(y.out, y.in, w, y.in, out + y.weight, y.op);
        else if (w)
            copy_rows(y.out, y.in, w, y.in, out + y.weight, y.ip);
        if (b) copy_rows(1, y.out, b, y.out, out + y.bias, y.op);
    }
}

static void unpack(const Net &net, const real *in, real *const *tensors, real *scratch) {
    for (i64 l = 0; l < net.n_layers; l++) {
        const Layer &y = net.layer[l];
        real *w = tensors[2 * l], *b = tensors[2 * l + 1];
        if (w && y.by_input) {
            transpose<true>(y.in, y.out, in + y.weight, y.op, scratch, y.ip);
            for (i64 o = 0; o < y.out; o++) memcpy(w + o * y.in, scratch + o * y.ip, y.in * sizeof(real));
        } else if (w)
            for (i64 o = 0; o < y.out; o++) memcpy(w + o * y.in, in + y.weight + o * y.ip, y.in * sizeof(real));
        if (b) memcpy(b, in + y.bias, y.out * sizeof(real));
    }
}

// what one pass over a set of rows leaves behind; index l is the output of layer l
struct Pass {
    real *x[MAX_LAYERS + 1], *z[MAX_LAYERS + 1], *dz[MAX_LAYERS + 1], *dx[MAX_LAYERS + 1];
    real *curve; // of the loss: probabilities of classes, or weighted second derivatives
    // `changes`: holds derivatives of another pass along a direction
    void place(const Net &net, i64 rows, bool changes, Arena &arena) {
        for (i64 l = 1; l <= net.n_layers; l++) {
            const Layer &y = net.layer[l - 1];
            x[l] = arena.take(rows * y.op);
            z[l] = keeps_input(y.act) || (changes && is_curved(y.act)) ? arena.take(rows * y.op) : x[l];
            dz[l] = arena.take(rows * y.op);
            dx[l] = is_curved(y.act) ? arena.take(rows * y.op) : dz[l];
        }
        curve = changes ? 0 : arena.take(rows * net.last().op);
    }
};

// the rows of one task; the weights sum to one
struct Set {
    i64 rows, stride; // of the rows of X
    const real *X, *y, *weight;
    const i64 *label;
};

// Packed parameters, and the transposes of those weights that are needed the other way round.
struct Theta {
    real *packed, *turned;
};
enum Way { FORWARD = 1, BACKWARD = 2 };

// transposes for passes in these ways; the first layer is never gone through backwards
static void turn_weights(const Net &net, const Theta &theta, int ways) {
    for (i64 l = 0; l < net.n_layers; l++) {
        const Layer &y = net.layer[l];
        bool needed = y.by_input ? ways & BACKWARD && l > 0 : ways & FORWARD;
        i64 m = weight_rows(y), n = y.by_input ? y.out : y.in;
        if (needed && m > FEW)
            transpose<true>(m, n, theta.packed + y.weight, weight_stride(y), theta.turned + y.turned, pad(m));
    }
}

// out[m, .] = init + x W for the weights as they are stored, or their transpose; plus the same of x2
static void times_weights(const Layer &y, bool transposed, i64 m, i64 stride, const real *x, const Theta &theta,
                          const real *x2, const Theta &theta2, const real *init, real *out) {
    Product q = {weight_rows(y), stride, 1, weight_stride(y),
                 {x, x2}, {theta.packed + y.weight, theta2.packed + y.weight}, 0};
    i64 columns = y.by_input ? y.out : y.in, n = transposed ? weight_rows(y) : columns;
    if (transposed && n <= FEW) return multiply_rows(m, n, columns, q, init, 0, out, pad(n));
    if (transposed) {
        q.k = columns, q.ldb = pad(n);
        q.b[0] = theta.turned + y.turned, q.b[1] = theta2.turned + y.turned;
    }
    multiply(m, n, q, init, 0, out, pad(n));
}

// out[rows, layer's outputs] = bias + x W^T (+ x2 W2^T)
static void apply(const Layer &y, i64 rows, i64 stride, const real *x, const Theta &theta, const real *x2,
                  const Theta &theta2, real *out) {
    times_weights(y, !y.by_input, rows, stride, x, theta, x2, theta2, theta.packed + y.bias, out);
}

// out[rows, layer's inputs] = d W (+ d2 W2)
static void apply_back(const Layer &y, i64 rows, const real *d, const Theta &theta, const real *d2,
                       const Theta &theta2, real *out) {
    times_weights(y, y.by_input, rows, y.op, d, theta, d2, theta2, 0, out);
}

// grad's weights = init's (null for zero) + x^T d (+ x2^T d2)
static void weight_grad(const Layer &y, i64 rows, i64 stride, const real *x, const real *d, const real *x2,
                        const real *d2, const real *init, real *grad) {
    Product q = {rows, 1, y.by_input ? stride : y.op, y.by_input ? y.op : stride, {x, x2}, {d, d2}, 0};
    if (!y.by_input) q.a[0] = d, q.a[1] = x2 ? d2 : 0, q.b[0] = x, q.b[1] = x2;
    multiply(weight_rows(y), y.by_input ? y.out : y.in, q, init ? init + y.weight : 0, weight_stride(y),
             grad + y.weight, weight_stride(y));
}

static void bias_grad(const Layer &y, i64 rows, const real *d, const real *init, real *grad) {
    for (i64 j = 0; j < y.op; j += V) {
        vec total = init ? load(init + y.bias + j) : (vec){};
        if (y.has_bias)
            for (i64 i = 0; i < rows; i++) total += load(d + i * y.op + j);
        store(grad + y.bias + j, total);
    }
}

static void forward(const Net &net, const Theta &theta, const Set &set, Pass &pass) {
    pass.x[0] = (real *)set.X;
    for (i64 l = 1; l <= net.n_layers; l++) {
        const Layer &y = net.layer[l - 1];
        apply(y, set.rows, l == 1 ? set.stride : y.ip, pass.x[l - 1], theta, 0, theta, pass.z[l]);
        if (y.act == IDENTITY) continue;
        maps[y.act].forward(set.rows * y.op, y.slope, pass.z[l], pass.x[l]);
        if (y.out < y.op && (y.act == SIGMOID || y.act == SOFTPLUS)) // padding stays zero
            for (i64 i = 0; i < set.rows; i++)
                memset(pass.x[l] + i * y.op + y.out, 0, (y.op - y.out) * sizeof(real));
    }
}

static inline real largest(const real *o, i64 n) {
    real top = o[0];
    for (i64 j = 1; j < n; j++) top = o[j] > top ? o[j] : top;
    return top;
}

// loss of the set and its derivatives by the outputs, the second ones in `curve`
typedef real (*LossOfSet)(const Net &, const Set &, const real *out, real *curve, real *d);
template <class L>
static real loss_of_set(const Net &net, const Set &set, const real *out, real *curve, real *d) {
    const Layer &y = net.last();
    const i64 n = y.out, stride = y.op;
    real total = 0, even = (real)1 / set.rows, share = (real)1 / n;
    for (i64 i = 0; i < set.rows; i++) {
        const real *o = out + i * stride, *t = set.y + i * n;
        real w = (set.weight ? set.weight[i] : even) * share, *g = d + i * stride, *c = curve + i * stride, row = 0;
        store(g + stride - V, (vec){});
        for (i64 j = 0; j < n; j++) {
            real d1, d2;
            row += L::at(o[j], t[j], net.parameter, d1, d2);
            g[j] = w * d1;
            c[j] = w * d2;
        }
        total += w * row;
    }
    return total;
}
static const LossOfSet losses[N_LOSSES] = {loss_of_set<SquaredError>, 0, loss_of_set<AbsoluteError>,
                                           loss_of_set<Huber>, loss_of_set<Quantile>, loss_of_set<Poisson>,
                                           loss_of_set<Gamma>, loss_of_set<Binary>};

// loss of the set and its derivative by the outputs; what `loss_change` needs goes to `curve`
static real loss(const Net &net, const Set &set, const real *out, real *curve, real *d) {
    if (!net.classes) return losses[net.loss](net, set, out, curve, d);
    const Layer &y = net.last();
    real total = 0, even = (real)1 / set.rows;
    real *prob = curve;
    for (i64 i = 0; i < set.rows; i++) {
        const real *o = out + i * y.op;
        real top = largest(o, y.out);
        for (i64 j = 0; j < y.op; j++) prob[i * y.op + j] = o[j] - top;
    }
    for (i64 i = 0; i < set.rows * y.op; i++) prob[i] = elementary::exp(prob[i]);
    for (i64 i = 0; i < set.rows; i++) {
        const real *o = out + i * y.op;
        real w = set.weight ? set.weight[i] : even, *p = prob + i * y.op, *g = d + i * y.op, norm = 0;
        for (i64 j = 0; j < y.out; j++) norm += p[j];
        for (i64 j = 0; j < y.out; j++) p[j] /= norm;
        store(g + y.op - V, (vec){});
        for (i64 j = 0; j < y.out; j++) g[j] = w * p[j];
        i64 label = set.label[i];
        if (label < 0 || label >= y.out) { // no such class: everything that follows is NaN
            for (i64 j = 0; j < y.out; j++) p[j] = g[j] = NAN;
            total = NAN;
            continue;
        }
        g[label] -= w;
        total -= w * (o[label] - largest(o, y.out) - F(log)(norm)); // the probability itself may underflow
    }
    return total;
}

// change of that derivative when the outputs change by r
static void loss_change(const Net &net, const Set &set, const real *curve, const real *r, real *d) {
    const Layer &y = net.last();
    real even = (real)1 / set.rows;
    for (i64 i = 0; i < set.rows; i++) {
        const real *p = curve + i * y.op, *q = r + i * y.op;
        real w = set.weight ? set.weight[i] : even, *g = d + i * y.op, mean = 0;
        store(g + y.op - V, (vec){});
        if (net.classes) {
            for (i64 j = 0; j < y.out; j++) mean += p[j] * q[j];
            for (i64 j = 0; j < y.out; j++) g[j] = w * p[j] * (q[j] - mean);
        } else
            for (i64 j = 0; j < y.out; j++) g[j] = p[j] * q[j];
    }
}

// gradient at theta, after `forward`; returns the loss
static real backward(const Net &net, const Theta &theta, const Set &set, Pass &pass, real *grad) {
    i64 n = net.n_layers;
    real value = loss(net, set, pass.x[n], pass.curve, pass.dx[n]);
    for (i64 l = n; l >= 1; l--) {
        const Layer &y = net.layer[l - 1];
        if (y.act != IDENTITY)
            maps[y.act].scale(set.rows * y.op, y.slope, pass.z[l], pass.x[l], pass.dx[l], pass.dz[l]);
        weight_grad(y, set.rows, l == 1 ? set.stride : y.ip, pass.x[l - 1], pass.dz[l], 0, 0, 0, grad);
        bias_grad(y, set.rows, pass.dz[l], 0, grad);
        if (l > 1) apply_back(y, set.rows, pass.dz[l], theta, 0, theta, pass.dx[l - 1]);
    }
    return value;
}

// v += H u, with the Hessian at theta; `pass` is what forward and backward left, r holds the changes
static void add_curvature(const Net &net, const Theta &theta, const Theta &u, const Set &set, const Pass &pass,
                          Pass &r, real *v) {
    i64 n = net.n_layers, rows = set.rows;
    for (i64 l = 1; l <= n; l++) {
        const Layer &y = net.layer[l - 1];
        apply(y, rows, l == 1 ? set.stride : y.ip, pass.x[l - 1], u, l > 1 ? r.x[l - 1] : 0, theta, r.z[l]);
        if (y.act != IDENTITY) maps[y.act].scale(rows * y.op, y.slope, pass.z[l], pass.x[l], r.z[l], r.x[l]);
    }
    loss_change(net, set, pass.curve, r.x[n], r.dx[n]);
    for (i64 l = n; l >= 1; l--) {
        const Layer &y = net.layer[l - 1];
        if (is_curved(y.act))
            maps[y.act].curve(rows * y.op, y.slope, pass.z[l], pass.x[l], r.z[l], pass.dx[l], r.dx[l], r.dz[l]);
        else if (y.act != IDENTITY)
            maps[y.act].scale(rows * y.op, y.slope, pass.z[l], pass.x[l], r.dx[l], r.dz[l]);
        weight_grad(y, rows, l == 1 ? set.stride : y.ip, pass.x[l - 1], r.dz[l], l > 1 ? r.x[l - 1] : 0, pass.dz[l],
                    v, v);
        bias_grad(y, rows, r.dz[l], v, v);
        if (l > 1) apply_back(y, rows, r.dz[l], theta, pass.dz[l], u, r.dx[l - 1]);
    }
}

// ---- batches of tasks --------------------------------------------------------------------------

struct Rows {
    const real *X, *y, *weight; // (n_tasks, width, ...); weight may be null
    const i64 *label, *lengths; // lengths may be null
    i64 width;
};

static const real *place_inputs(const Layer &first, i64 rows, const real *X, real *buffer, i64 &stride) {
    stride = first.in;
    if (first.by_input) return X; // read number by number
    copy_rows(rows, first.in, X, first.in, buffer, stride = first.ip);
    return buffer;
}

// rows of task j; `buffer` has room for the inputs, padded
static Set task(const Net &net, const Rows &rows, i64 j, real *buffer) {
    const Layer &first = net.layer[0];
    Set set;
    set.rows = rows.lengths ? rows.lengths[j] : rows.width;
    set.X = place_inputs(first, set.rows, rows.X + j * rows.width * first.in, buffer, set.stride);
    set.y = rows.y ? rows.y + j * rows.width * net.last().out : 0;
    set.label = rows.label ? rows.label + j * rows.width : 0;
    set.weight = rows.weight ? rows.weight + j * rows.width : 0;
    return set;
}

struct Job {
    Net net, inner; // inner: what tasks take steps in, see `narrow`; the same as net unless `wide`
    Rows support, query;
    real *theta, *rates; // packed, rates of inner; the last of n_rates serves all further steps
    i64 n_tasks, steps, n_rates, n_blocks;
    bool wide, second_order, recompute, adapts[2 * MAX_LAYERS]; // adapts: which tensors have rates
    real most; // norm that gradients are clipped to, or 0
    real *losses, *outputs;
    real *grads, *rate_grads; // packed, of each block; rate_grads may be null
    real *const *own;         // tensors of task j at own[t] + j * own_stride[t], or null
    const i64 *own_stride;
    bool (*run)(const Job &, i64 begin, i64 end, i64 block, Arena &);
};

static i64 rate_number(const Job &job, i64 k) { return k < job.n_rates ? k : job.n_rates - 1; }

static real *rate(const Job &job, i64 k) { return job.rates + rate_number(job, k) * job.inner.packed; }

static void step(i64 n, const real *theta, const real *rate, const real *grad, real *next) {
    for (i64 i = 0; i < n; i += V) store(next + i, load(theta + i) - load(rate + i) * load(grad + i));
}

// scales the part of a gradient that adapts to a norm of at most job.most, in place, and drops the
// rest; returns the factor
static real clip(const Job &job, real *grad) {
    const Net &net = job.inner;
    vec squares = {};
    for (i64 t = 0; t < 2 * net.n_layers; t++) {
        const Layer &y = net.layer[t / 2];
        real *g = grad + (t % 2 ? y.bias : y.weight);
        i64 n = t % 2 ? y.op : weight_rows(y) * weight_stride(y);
        if (!job.adapts[t]) memset(g, 0, n * sizeof(real));
        for (i64 i = 0; i < n; i += V) squares += load(g + i) * load(g + i);
    }
    real factor = job.most / F(sqrt)(sum(squares) + (real)1e-12); // as update_rules.steps.clip_gradient
    if (factor >= 1) return 1;
    for (i64 i = 0; i < net.packed; i += V) store(grad + i, factor * load(grad + i));
    return factor;
}

// change of the clipped gradient `grad`, for a change u of the gradient that it was made of, in place
static void clip_change(const Job &job, real factor, const real *grad, real *u) {
    const i64 size = job.inner.packed;
    vec along = {};
    for (i64 i = 0; i < size; i += V) along += load(grad + i) * load(u + i);
    vec share = splat(sum(along) / (job.most * job.most));
    for (i64 i = 0; i < size; i += V) store(u + i, factor * (load(u + i) - share * load(grad + i)));
}

static void write_rows(const Net &net, const Set &set, const real *x, real *out) {
    const Layer &y = net.last();
    for (i64 i = 0; i < set.rows; i++)
        for (i64 j = 0; j < y.out; j++) out[i * y.out + j] = x[i * y.op + j];
}

// whether the sweep needs the gradients of all steps
static bool keeps_grads(const Job &job) {
    return job.rate_grads || (job.most && job.second_order && !job.recompute);
}

struct MetaSpace {
    real *Xs, *Xq, *Q, *kept, *factor, *v;
    Theta *theta, u;
    Pass query, change, *passes;
    void place(const Job &job, i64 n_passes, Arena &a) {
        const Net &net = job.inner;
        Xs = a.take(job.support.width * net.layer[0].ip);
        Xq = a.take(job.query.width * net.layer[0].ip);
        Q = a.take(job.wide ? net.layer[0].in * job.net.layer[0].ip : 0);
        for (i64 k = 0; k <= job.steps; k++) {
            bool again = job.second_order && !job.recompute; // the transposes serve the sweep, too
            // first order has no use for what it leaves behind
            theta[k].packed = job.second_order || k == 0 ? a.take(net.packed) : theta[0].packed;
            theta[k].turned = again || k == 0 ? a.take(net.turned) : theta[0].turned;
        }
        kept = a.take((keeps_grads(job) ? job.steps : 1) * net.packed);
        factor = a.take(job.steps);
        v = a.take(net.packed);
        u.packed = a.take(net.packed), u.turned = a.take(net.turned);
        for (i64 k = 0; k < n_passes; k++) passes[k].place(net, job.support.width, false, a);
        query.place(net, job.query.width, false, a);
        change.place(net, job.support.width, true, a);
    }
};

// Row `number` of Q, n numbers of inputs, becomes orthogonal to the rows before it, with norm 1, or 0 if
// it is a sum of them; `to` gets the inputs as a sum of rows of Q.
static void split(i64 number, i64 n, real *Q, real *to) {
    real *q = Q + number * n;
    const real before = F(sqrt)(dot_rows(n, q, q));
    for (int round = 0; round < 2; round++) // again, for what rounding has left
        for (i64 j = 0; j < number; j++) {
            const real *other = Q + j * n, along = dot_rows(n, other, q);
            to[j] += along;
            for (i64 i = 0; i < n; i += V) store(q + i, load(q + i) - along * load(other + i));
        }
    const real norm = F(sqrt)(dot_rows(n, q, q));
    if (norm <= 4 * EPSILON * before) { // not so where there is a NaN
        memset(q, 0, n * sizeof(real));
        return;
    }
    to[number] = norm;
    for (i64 i = 0; i < n; i += V) store(q + i, load(q + i) / norm);
}

// The inputs of a task are L Q, for an orthonormal basis Q of the space that they span. Gradients of the
// first layer's weights W are in that space, and W Q' takes the same steps on L as W on the inputs, if
// all of W has one rate: they are much smaller where there are fewer rows than inputs.
static void narrow(const Job &job, Set &support, Set &query, const MetaSpace &s) {
    const Layer &full = job.net.layer[0], &first = job.inner.layer[0];
    memset(s.Q, 0, first.in * full.ip * sizeof(real));
    i64 number = 0;
    for (int which = 0; which < 2; which++) {
        Set *set = which ? &query : &support;
        real *L = which ? s.Xq : s.Xs;
        memset(L, 0, set->rows * first.ip * sizeof(real));
        for (i64 i = 0; i < set->rows; i++, number++) {
            memcpy(s.Q + number * full.ip, set->X + i * set->stride, full.in * sizeof(real));
            split(number, full.ip, s.Q, L + i * first.ip);
        }
        set->X = L, set->stride = first.ip;
    }
    real *theta = s.theta[0].packed;
    multiply(first.in, first.out, {full.in, full.ip, 1, full.op, {s.Q, 0}, {job.theta, 0}, 0}, 0, 0, theta, first.op);
    memcpy(theta + first.bias, job.theta + full.bias, (job.inner.packed - first.bias) * sizeof(real));
}

// total += v; of the first layer's weights Q' v
static void add_gradient(const Job &job, const real *Q, const real *v, real *total) {
    const Layer &full = job.net.layer[0], &first = job.inner.layer[0];
    i64 at = 0, to = 0;
    if (job.wide) {
        multiply(full.in, full.out, {first.in, 1, full.ip, first.op, {Q, 0}, {v, 0}, 0}, total, full.op, total, full.op);
        at = first.bias, to = full.bias;
    }
    for (; at < job.inner.packed; at += V, to += V) store(total + to, load(total + to) + load(v + at));
}

static bool meta_tasks(const Job &job, i64 begin, i64 end, i64 block, Arena &arena) {
    const Net &net = job.inner;
    const i64 size = net.packed, K = job.steps;
    const i64 n_passes = job.second_order && !job.recompute && K ? K : 1;
    MetaSpace s;
    s.passes = (Pass *)malloc(n_passes * sizeof(Pass));
    s.theta = (Theta *)malloc((K + 1) * sizeof(Theta));
    arena.measures = true, arena.used = 0;
    if (s.passes && s.theta) s.place(job, n_passes, arena);
    if (!s.passes || !s.theta || !arena.reserve()) {
        free(s.passes), free(s.theta);
        return false;
    }
    s.place(job, n_passes, arena);
    real *total = job.grads + block * job.net.packed;
    memset(total, 0, job.net.packed * sizeof(real));
    real *rate_total = job.rate_grads ? job.rate_grads + block * job.n_rates * size : 0;
    if (rate_total) memset(rate_total, 0, job.n_rates * size * sizeof(real));
    const bool keeps = job.second_order && !job.recompute;
    for (i64 j = begin; j < end; j++) {
        Set support = task(job.net, job.support, j, s.Xs), query = task(job.net, job.query, j, s.Xq);
        if (job.wide)
            narrow(job, support, query, s);
        else if (j == begin || !job.second_order) // the task before has overwritten them
            memcpy(s.theta[0].packed, job.theta, size * sizeof(real));
        if (j == begin || job.wide || !keeps) turn_weights(net, s.theta[0], FORWARD | BACKWARD);
        for (i64 k = 0; k < K; k++) {
            real *grad = s.kept + (keeps_grads(job) ? k * size : 0);
            Pass &pass = s.passes[k < n_passes ? k : 0];
            forward(net, s.theta[k], support, pass);
            backward(net, s.theta[k], support, pass, grad);
            if (job.most) s.factor[k] = clip(job, grad);
            step(size, s.theta[k].packed, rate(job, k), grad, s.theta[k + 1].packed);
            turn_weights(net, s.theta[k + 1], FORWARD | BACKWARD);
        }
        forward(net, s.theta[K], query, s.query);
        job.losses[j] = backward(net, s.theta[K], query, s.query, s.v);
        write_rows(net, query, s.query.x[net.n_layers], job.outputs + j * job.query.width * net.last().out);
        for (i64 k = K - 1; k >= 0; k--) {
            real *grad = s.kept + (keeps_grads(job) ? k * size : 0);
            if (rate_total) {
                real *to = rate_total + rate_number(job, k) * size;
                for (i64 i = 0; i < size; i += V) store(to + i, load(to + i) - load(s.v + i) * load(grad + i));
            }
            if (!job.second_order) continue;
            const Theta &at = s.theta[k];
            real *r = rate(job, k);
            Pass &pass = s.passes[k < n_passes ? k : 0];
            if (job.recompute) {
                turn_weights(net, at, FORWARD | BACKWARD);
                forward(net, at, support, pass);
                backward(net, at, support, pass, grad);
                if (job.most) clip(job, grad);
            }
            for (i64 i = 0; i < size; i += V) store(s.u.packed + i, -load(r + i) * load(s.v + i));
            if (job.most && s.factor[k] < 1) clip_change(job, s.factor[k], grad, s.u.packed);
            turn_weights(net, s.u, FORWARD | BACKWARD);
            add_curvature(net, at, s.u, support, pass, s.change, s.v);
        }
        add_gradient(job, s.Q, s.v, total);
    }
    free(s.passes), free(s.theta);
    return true;
}

static void own_tensors(const Job &job, i64 j, real **tensors) {
    for (i64 t = 0; t < 2 * job.net.n_layers; t++)
        tensors[t] = job.own[t] ? job.own[t] + j * job.own_stride[t] : 0;
}

static bool adapt_tasks(const Job &job, i64 begin, i64 end, i64, Arena &arena) {
    const Net &net = job.net;
    const i64 size = net.packed;
    real *X = 0, *grad = 0, *scratch = 0, *tensors[2 * MAX_LAYERS];
    Theta theta = {0, 0};
    Pass pass;
    for (int round = 0; round < 2; round++) {
        if (round == 0) arena.measures = true, arena.used = 0;
        if (round == 1 && !arena.reserve()) return false;
        X = arena.take(job.support.width * net.layer[0].ip);
        theta.packed = arena.take(size), theta.turned = arena.take(net.turned), grad = arena.take(size);
        scratch = arena.take(net.scratch);
        pass.place(net, job.support.width, false, arena);
    }
    for (i64 j = begin; j < end; j++) {
        Set support = task(net, job.support, j, X);
        memcpy(theta.packed, job.theta, size * sizeof(real));
        for (i64 k = 0; k < job.steps; k++) {
            turn_weights(net, theta, FORWARD | BACKWARD);
            forward(net, theta, support, pass);
            backward(net, theta, support, pass, grad);
            if (job.most) clip(job, grad);
            step(size, theta.packed, rate(job, k), grad, theta.packed);
        }
        own_tensors(job, j, tensors);
        unpack(net, theta.packed, tensors, scratch);
    }
    return true;
}

enum { ROWS_AT_A_TIME = 128 }; // of a prediction

static bool predict_tasks(const Job &job, i64 begin, i64 end, i64, Arena &arena) {
    const Net &net = job.net;
    const i64 width = job.query.width, chunk = width < ROWS_AT_A_TIME ? width : ROWS_AT_A_TIME;
    real *X = 0, *tensors[2 * MAX_LAYERS];
    Theta theta = {0, 0};
    Pass pass;
    for (int round = 0; round < 2; round++) {
        if (round == 0) arena.measures = true, arena.used = 0;
        if (round == 1 && !arena.reserve()) return false;
        X = arena.take(chunk * net.layer[0].ip);
        theta.packed = arena.take(net.packed), theta.turned = arena.take(net.turned);
        pass.place(net, chunk, false, arena);
    }
    memcpy(theta.packed, job.theta, net.packed * sizeof(real));
    for (i64 j = begin; j < end; j++) {
        own_tensors(job, j, tensors);
        pack(net, tensors, theta.packed); // leaves what the tasks share
        turn_weights(net, theta, FORWARD);
        i64 rows = job.query.lengths ? job.query.lengths[j] : width;
        for (i64 i = 0; i < rows; i += chunk) {
            Set set;
            set.rows = rows - i < chunk ? rows - i : chunk;
            const Layer &first = net.layer[0];
            set.X = place_inputs(first, set.rows, job.query.X + (j * width + i) * first.in, X, set.stride);
            forward(net, theta, set, pass);
            write_rows(net, set, pass.x[net.n_layers], job.outputs + (j * width + i) * net.last().out);
        }
    }
    return true;
}

static bool run_block(const void *p, i64 block, Arena &arena) {
    const Job &job = *(const Job *)p;
    i64 begin = block * job.n_tasks / job.n_blocks, end = (block + 1) * job.n_tasks / job.n_blocks;
    return job.run(job, begin, end, block, arena);
}

// ---- entry points ------------------------------------------------------------------------------

static Rows rows_of(const Net &net, const i64 *a) {
    return {(const real *)a[0], net.classes ? 0 : (const real *)a[1], (const real *)a[2],
            net.classes ? (const i64 *)a[1] : 0, (const i64 *)a[3], a[4]};
}

// Whether a meta-step is cheaper in the space of a task's rows, and may be taken there: `narrow`. An input
// of each row is gone through as often as there are rows to find the space, and that often in a step.
enum { WIDE = 4 };
static bool is_wide(const i64 *a) {
    const i64 *sizes = (const i64 *)a[SIZES], n_layers = sizes[0], n = sizes[2] * sizes[3];
    const i64 n_rows = a[SUPPORT_X + 4] + a[QUERY_X + 4];
    if (!n_rows || sizes[2] < WIDE * n_rows || a[RATE_GRADS]) return false;
    for (i64 k = 0; k < a[N_RATES]; k++) {
        const real *rate = ((const real *const *)a[RATES])[2 * n_layers * k];
        for (i64 i = 1; rate && i < n; i++)
            if (rate[i] != rate[0]) return false;
    }
    return true;
}

static bool start(const i64 *a, Job &job, bool wide) {
    describe((const i64 *)a[SIZES], (const double *)a[SLOPES], wide, job.net);
    const Net &net = job.net;
    job.support = rows_of(net, a + SUPPORT_X);
    job.query = rows_of(net, a + QUERY_X);
    job.wide = wide, job.inner = net;
    if (wide) job.inner.layer[0].in = job.support.width + job.query.width, lay_out(job.inner, true);
    job.n_tasks = a[N_TASKS], job.steps = a[STEPS], job.n_rates = a[N_RATES];
    job.most = (real)((const double *)a[SLOPES])[net.n_layers + 1];
    for (i64 t = 0; t < 2 * net.n_layers; t++)
        job.adapts[t] = job.n_rates && ((const real *const *)a[RATES])[t];
    job.second_order = a[SECOND_ORDER], job.recompute = a[RECOMPUTE];
    job.losses = (real *)a[LOSSES], job.outputs = (real *)a[OUTPUTS];
    job.own = (real *const *)a[OWN], job.own_stride = (const i64 *)a[OWN_STRIDES];
    job.grads = job.rate_grads = 0;
    job.n_blocks = (job.n_tasks + TASKS_PER_BLOCK - 1) / TASKS_PER_BLOCK;
    if (job.n_blocks > MAX_BLOCKS) job.n_blocks = MAX_BLOCKS;
    if (job.n_blocks < 1) job.n_blocks = 1; // no tasks: sums of nothing
    void *p = 0;
    if (posix_memalign(&p, 64, (1 + job.n_rates) * net.packed * sizeof(real))) return false;
    job.theta = (real *)p, job.rates = job.theta + net.packed;
    memset(p, 0, (1 + job.n_rates) * net.packed * sizeof(real));
    pack(net, (const real *const *)a[THETA], job.theta);
    for (i64 k = 0; k < job.n_rates; k++)
        pack(net, (const real *const *)a[RATES] + 2 * net.n_layers * k, job.rates + k * net.packed);
    const Layer &full = net.layer[0], &first = job.inner.layer[0];
    for (i64 k = 0; k < job.n_rates && wide; k++) { // in place
        const real *from = job.rates + k * net.packed, rate = from[0];
        real *to = job.rates + k * job.inner.packed;
        memmove(to + first.bias, from + full.bias, (job.inner.packed - first.bias) * sizeof(real));
        for (i64 i = 0; i < first.bias; i++) to[i] = rate;
    }
    return true;
}

// sum of the blocks' gradients, over the number of tasks, into natural tensors end to end
static void finish(const Job &job, real *parts, i64 stride, real *flat, real *scratch) {
    real *tensors[2 * MAX_LAYERS];
    for (i64 l = 0; l < job.net.n_layers; l++) {
        const Layer &y = job.net.layer[l];
        tensors[2 * l] = flat, flat += y.in * y.out;
        tensors[2 * l + 1] = y.has_bias ? flat : 0, flat += y.has_bias ? y.out : 0;
    }
    for (i64 b = 1; b < job.n_blocks; b++)
        for (i64 i = 0; i < job.net.packed; i += V)
            store(parts + i, load(parts + i) + load(parts + b * stride + i));
    vec share = splat((real)1 / job.n_tasks);
    for (i64 i = 0; i < job.net.packed; i += V) store(parts + i, load(parts + i) * share);
    unpack(job.net, parts, tensors, scratch);
}

static bool meta_step(const i64 *a) {
    Job job;
    if (!start(a, job, is_wide(a))) return false;
    const i64 size = job.net.packed, n_rate_grads = a[RATE_GRADS] ? job.n_rates : 0;
    void *p = 0;
    bool done = !posix_memalign(
        &p, 64, ((1 + n_rate_grads) * job.n_blocks * size + job.net.scratch) * sizeof(real));
    if (done) {
        job.grads = (real *)p;
        real *rate_grads = job.grads + job.n_blocks * size, *scratch = rate_grads + n_rate_grads * job.n_blocks * size;
        if (n_rate_grads) job.rate_grads = rate_grads;
        job.run = meta_tasks;
        done = run_blocks(&job, job.n_blocks, run_block, a[N_THREADS]);
        finish(job, job.grads, size, (real *)a[GRADS], scratch);
        for (i64 k = 0; k < n_rate_grads; k++)
            finish(job, rate_grads + k * size, job.n_rates * size,
                   (real *)a[RATE_GRADS] + k * a[N_WEIGHTS], scratch);
    }
    free(p);
    free(job.theta);
    return done;
}

static bool run_tasks(const i64 *a, bool (*run)(const Job &, i64, i64, i64, Arena &)) {
    Job job;
    if (!start(a, job, false)) return false;
    job.run = run;
    bool done = run_blocks(&job, job.n_blocks, run_block, a[N_THREADS]);
    free(job.theta);
    return done;
}

static bool adapt(const i64 *a) { return run_tasks(a, adapt_tasks); }
static bool predict(const i64 *a) { return run_tasks(a, predict_tasks); }

} // namespace

extern const Kernels KERNELS(LEVEL, REAL) = {
    meta_step, adapt, predict, HEAD(step, LEVEL, REAL),
#if REAL_IS_DOUBLE
    HEAD(pack, LEVEL, REAL), HEAD(condition, LEVEL, REAL), HEAD(query, LEVEL, REAL),
#endif
};
