// What the support rows of tasks make of the prior of a Gaussian head, and predictions of other rows:
// the functions `condition`, `moments` and `outputs` of learners/gaussian.py, in double precision, and
// `condition` of learners/laplace.py.
//
// Of no more rows than columns, W = inv(L) for the system S S' + n = L L' of rows: the mean of the weights is
// S' W' W r and their covariance 1 - H' H, with H = W S. Of more rows, for the system S' S + n of columns:
// W' W S' r and H' H, with the triangle H = W sqrt(n).
//
// Every task, and every predicted row, is computed by itself: results depend neither on what else is asked
// for nor on the number of threads.
// Included by head.cpp, for double alone.

namespace {

static i64 n_columns(const Shape &s) { return s.n_linear + s.width(); }
static bool is_of_rows(const Shape &s, i64 n) { return n <= n_columns(s); }

// H is kept in panels of so many rows, those of a column side by side: what a predicted row is multiplied with is read
// from the first number to the last, and memory is what that waits for. Fewer than 8 rows are filled up by zeros.
enum { PANEL_ROWS = 32 };

struct Conditioning {
    Job job;                            // the support rows are its first set
    const double *y, *root;             // (n_tasks, width, n_outputs) and (n_tasks, width)
    i64 n_half;                         // rows of H there is room for, 0 if none is asked for
    double *shift, *misfit, *moved, *n_moved, *log_det, *n_rows, *half; // see `Posterior`
    bool *of_rows;
    double *columns, *roots, *inverse, *objective; // see `LaplacePosterior`
};

struct Systems {
    real *turned, *gram, *r, *u, *v, *expected, *U, *W, *vectors;
    void place(const Shape &s, i64 width, Arena &a) {
        const i64 pn = pad(width), most = pn > s.columns ? pn : s.columns, C = s.n_outputs;
        const i64 n = is_of_rows(s, width) ? pn : s.columns; // of a system
        turned = a.take(s.columns * pad(n_columns(s))), gram = a.take(n * n), U = a.take(n * n), W = a.take(n * n);
        r = a.take(C * pn), u = a.take(C * most), v = a.take(C * s.columns);
        expected = a.take(s.outputs), vectors = s.likelihood ? a.take(N_VECTORS * pn) : 0;
    }
};

// where columns are, without their padding: the first of each part, and how many they are
struct Parts {
    i64 of[4][2];
    Parts(const Shape &s)
        : of{{0, s.n_linear},
             {s.linear, s.units[s.n_layers - 1]},
             {s.linear + s.last(), s.n_waves},
             {s.linear + s.last() + s.waves, s.n_waves}} {}
};

// columns without their padding, each of `width` numbers; may be in place
static void compact(const Shape &s, i64 width, const real *from, real *to) {
    for (const auto &part : Parts(s).of) {
        memmove(to, from + part[0] * width, part[1] * width * sizeof(real));
        to += part[1] * width;
    }
}

// panels of H, from the inverse factor W (ld) of a system; U is overwritten
static void keep_half(const Shape &s, i64 n, bool of_rows, double noise, const real *S, i64 ld, const real *W, real *U,
                      i64 n_half, real *to) {
    const i64 K = s.columns, p = n_columns(s), size = of_rows ? n : K;
    const double root = sqrt(noise);
    transpose<true>(size, size, W, ld, U, ld);
    if (!of_rows) {
        compact(s, K, U, U);
        for (i64 c = 0; c < p; c++) compact(s, 1, U + c * K, U + c * K);
    }
    for (i64 r = 0; r < n_half; r += PANEL_ROWS) {
        const i64 m = n_half - r < PANEL_ROWS ? n_half - r : PANEL_ROWS, there = of_rows ? pad(n) - r : p - r;
        const i64 mine = there < m ? there : m, k = r + mine < n ? r + mine : n;
        if (mine < m) memset(to, 0, p * m * sizeof(real));
        if (mine <= 0) {
            to += p * m;
            continue;
        }
        if (!of_rows) {
            for (i64 c = 0; c < p; c++, to += m)
                for (i64 i = 0; i < mine; i++) to[i] = root * U[c * K + r + i];
            continue;
        }
        for (const auto &part : Parts(s).of) { // H' = S' W', of which W' is a triangle
            multiply(part[1], mine, {k, 1, K, ld, {S + part[0], 0}, {U + r, 0}, 0}, 0, 0, to, m);
            to += part[1] * m;
        }
    }
}

// residuals (n_outputs, pn) of the n rows of a task
static void residuals(const Conditioning &q, const real *theta, const Row *rows, i64 n, const real *prior, Systems &b) {
    const Shape &s = q.job.shape;
    const i64 pn = pad(n), C = s.n_outputs;
    memset(b.r, 0, C * pn * sizeof(real));
    for (i64 i = 0; i < n; i++, prior += s.outputs) {
        const double *y = q.y + (rows[i].task * q.job.sets[0].width + rows[i].number) * C;
        if (s.classes) softmax(C, prior, b.expected);
        for (i64 c = 0; c < C; c++) {
            const double even = 1.0 / C;
            const double target = s.classes
                                      ? theta[s.code] * (y[c] - even - theta[s.surprise] * (b.expected[c] - even))
                                      : y[c] / theta[s.amplitude + c];
            b.r[c * pn + i] = rows[i].root * (target - prior[c]);
        }
    }
}

// upper triangle of the products of the n columns of b, of k rows, by panels of rows; a is b or its transpose
static void gram_of(i64 k, i64 n, const real *a, i64 rs, i64 cs, const real *b, i64 ld, real *to) {
    for (i64 i = 0; i < n; i += MAX_ROWS) {
        const i64 m = n - i < MAX_ROWS ? n - i : MAX_ROWS;
        multiply(m, n - i, {k, rs, cs, ld, {a + i * rs, 0}, {b + i, 0}, 0}, 0, 0, to + i * ld + i, ld);
    }
}

// to = W' W x, for the n rows of a triangle W; returns the squared length of W x
static double solve(i64 n, i64 ld, const double *W, const double *x, double *to) {
    double length = 0;
    memset(to, 0, ld * sizeof(double));
    for (i64 i = 0; i < n; i++) {
        const double *w = W + i * ld, z = dot(i + 1, w, x);
        length += z * z;
        for (i64 j = 0; j <= i; j += VD) *(dvec *)(to + j) += z * *(const dvec *)(w + j);
    }
    return length;
}

// one task, of the n rows S
static void condition(const Conditioning &q, i64 member, const real *theta, i64 task, const Row *rows, i64 n, const real *S,
                      const real *prior, Systems &b) {
    const Shape &s = q.job.shape;
    const bool of_rows = is_of_rows(s, n);
    const i64 C = s.n_outputs, K = s.columns, p = n_columns(s), pn = pad(n), at = member * q.job.n_tasks + task;
    const i64 size = of_rows ? n : K, ld = pad(size);
    residuals(q, theta, rows, n, prior, b);
    if (of_rows) {
        transpose<true>(n, K, S, K, b.turned, pn);
        gram_of(K, n, S, K, 1, b.turned, ld, b.gram);
    } else {
        gram_of(n, K, S, 1, K, S, K, b.gram);
        multiply(C, K, {n, pn, 1, K, {b.r, 0}, {S, 0}, 0}, 0, 0, b.u, K);
    }
    for (i64 o = 0; o < s.n_noises; o++) {
        const double noise = theta[s.noise + o];
        memcpy(b.U, b.gram, size * ld * sizeof(double));
        for (i64 i = 0; i < size; i++) b.U[i * ld + i] += noise;
        invert_factor(size, ld, b.U, b.W);
        double log_det = 0, n_moved = 0;
        for (i64 i = 0; i < size; i++) {
            const double *w = b.W + i * ld;
            log_det -= 2 * log(w[i]) + log(noise);
            n_moved += 1 - noise * dot(i + 1, w, w);
        }
        q.log_det[at * s.n_noises + o] = log_det, q.n_moved[at * s.n_noises + o] = n_moved;
        const bool shared = s.n_noises == 1; // by all outputs
        for (i64 c = shared ? 0 : o; c < (shared ? C : o + 1); c++) {
            double misfit = 0, *v = b.v + c * K;
            const double *r = b.r + c * pn;
            if (of_rows) {
                misfit = solve(n, ld, b.W, r, b.u + c * pn);
            } else { // as a sum of squares, since it may be small beside theirs
                solve(K, ld, b.W, b.u + c * K, v);
                for (i64 i = 0; i < n; i++) {
                    const double left = r[i] - dot_rows(K, S + i * K, v);
                    misfit += left * left;
                }
                misfit = misfit / noise + dot_rows(K, v, v);
            }
            q.misfit[at * C + c] = misfit;
        }
        if (!q.n_half) continue;
        keep_half(s, n, of_rows, noise, S, ld, b.W, b.U, q.n_half, q.half + (at * s.n_noises + o) * p * q.n_half);
    }
    if (of_rows) multiply(C, K, {n, pn, 1, K, {b.u, 0}, {S, 0}, 0}, 0, 0, b.v, K);
    for (i64 c = 0; c < C; c++) {
        double *v = b.v + c * K, *to = q.shift + at * p * C + c;
        compact(s, 1, v, v);
        double moved = 0;
        for (i64 i = 0; i < p; i++) to[i * C] = v[i], moved += v[i] * v[i];
        q.moved[at * C + c] = moved;
    }
    if (!member) q.of_rows[task] = of_rows;
}

// one task, whose likelihood takes Newton steps, of no more rows than columns
static void condition_at_mode(const Conditioning &q, i64 member, const real *theta, i64 task, const Row *rows, i64 n,
                              const real *S, const real *prior, Systems &b) {
    const Shape &s = q.job.shape;
    const i64 C = s.n_outputs, K = s.columns, p = n_columns(s), pn = pad(n), N = q.job.sets[0].width;
    const i64 at = member * q.job.n_tasks + task;
    double *columns = q.columns + at * N * p, *roots = q.roots + at * N * C, *inverse = q.inverse + at * C * N * N;
    if (N) { // else there is no memory
        memset(columns, 0, N * p * sizeof(double)), memset(roots, 0, N * C * sizeof(double));
        memset(inverse, 0, C * N * N * sizeof(double));
    }
    for (i64 i = 0; i < C * N; i++) inverse[i * N + i % N] = 1; // rows that do not count have nothing to do with others
    for (i64 i = 0; i < n; i++) compact(s, 1, S + i * K, columns + rows[i].number * p);
    transpose<true>(n, K, S, K, b.turned, pn);
    multiply(n, n, {K, K, 1, pn, {S, 0}, {b.turned, 0}, 0}, 0, 0, b.gram, pn);
    Mode mode(n, pn, b.gram, b.U, b.W, b.vectors);
    mode.rows = rows, mode.stride = s.outputs;
    for (i64 o = 0; o < C; o++, inverse += N * N) {
        mode.amplitude = theta[s.amplitude + o], mode.prior = prior + o;
        const double dispersion = theta[s.noise + o] * mode.amplitude * mode.amplitude;
        mode.likelihood = {s.likelihood, dispersion, q.job.unit[o], s.delta};
        for (i64 i = 0; i < n; i++) mode.y[i] = q.y[(task * N + rows[i].number) * C + o];
        q.objective[at * C + o] = mode.find();
        memcpy(b.u + o * pn, mode.u, pn * sizeof(double));
        memset(b.U, 0, n * pn * sizeof(double));
        subtract_squares(n, 0, pn, b.W, b.U);
        for (i64 i = 0; i < n; i++) {
            roots[rows[i].number * C + o] = mode.support.root[i];
            for (i64 j = 0; j < n; j++) inverse[rows[i].number * N + rows[j].number] = -b.U[i * pn + j];
        }
    }
    multiply(C, K, {n, pn, 1, K, {b.u, 0}, {S, 0}, 0}, 0, 0, b.v, K);
    for (i64 c = 0; c < C; c++) {
        compact(s, 1, b.v + c * K, b.v + c * K);
        for (i64 i = 0; i < p; i++) q.shift[(at * p + i) * C + c] = b.v[c * K + i];
    }
}

static bool condition_part(const void *given, i64 part, Arena &arena) {
    const Conditioning &q = *(const Conditioning *)given;
    const Job &job = q.job;
    const i64 member = part / job.n_parts, number = part % job.n_parts, N = job.sets[0].width;
    const i64 begin = number * job.n_tasks / job.n_parts, end = (number + 1) * job.n_tasks / job.n_parts;
    const i64 at_a_time = N && N < ROWS_AT_A_TIME ? ROWS_AT_A_TIME / N : 1;
    const real *theta = job.theta + member * job.shape.size_with_turned;
    Features a;
    Systems b;
    for (int round = 0; round < 2; round++) {
        if (round && !arena.reserve()) return false;
        if (!round) arena.measures = true, arena.used = 0;
        a.place(job.shape, at_a_time * N, arena), b.place(job.shape, N, arena);
    }
    for (i64 from = begin; from < end; from += at_a_time) {
        const i64 to = from + at_a_time < end ? from + at_a_time : end;
        i64 used = 0, starts[ROWS_AT_A_TIME + 1];
        for (i64 t = from; t < to; t++) {
            double n_rows = 0;
            starts[t - from] = used;
            for (i64 i = 0; i < N; i++) {
                const double root = q.root[t * N + i];
                if (root > 0) a.rows[used++] = job.shape.likelihood ? Row{t, i, root * root, 1} : Row{t, i, 1, root};
                n_rows += root * root;
            }
            if (!member && q.n_rows) q.n_rows[t] = n_rows;
        }
        starts[to - from] = used;
        features(job, theta, used, a);
        for (i64 t = from; t < to; t++) {
            const i64 first = starts[t - from], n = starts[t - from + 1] - first;
            const auto of_task = job.shape.likelihood ? condition_at_mode : condition;
            of_task(q, member, theta, t, a.rows + first, n, a.S + first * job.shape.columns,
                    a.prior + first * job.shape.outputs, b);
        }
    }
    return true;
}

struct Query {
    Job job; // the rows are its first set, of one task
    i64 n_tasks, n_half;
    const i64 *place;       // (n_rows,): the task of each row
    const void *shift;      // of float or double
    const double *half;
    const bool *of_rows;    // (n_tasks,)
    bool shift_is_double;
    double *mean, *variance; // (n_members, n_rows, n_outputs) and (n_members, n_rows, n_noises); the latter may be absent
};

struct Predictions {
    real *turned, *weights, *out, *moved;
    void place(const Shape &s, Arena &a) {
        const i64 most = pad(ROWS_AT_A_TIME);
        turned = a.take(s.columns * most), weights = a.take(s.columns * s.n_outputs);
        out = a.take(s.n_outputs * most), moved = a.take(ROWS_AT_A_TIME * PANEL_ROWS);
    }
};

// n rows of one task, the first of which is row `first` of all
static void predict(const Query &q, i64 member, const real *theta, i64 first, i64 n, const real *S, const real *prior,
                    Predictions &b) {
    const Shape &s = q.job.shape;
    const i64 C = s.n_outputs, p = n_columns(s), pn = pad(n), n_rows = q.job.sets[0].width;
    const i64 at = member * q.n_tasks + q.place[first];
    transpose<true>(n, s.columns, S, s.columns, b.turned, pn);
    compact(s, pn, b.turned, b.turned);
    const double *weights = (const double *)q.shift + at * p * C;
    if (!q.shift_is_double) {
        for (i64 i = 0; i < p * C; i++) b.weights[i] = ((const float *)q.shift)[at * p * C + i];
        weights = b.weights;
    }
    multiply(C, n, {p, 1, C, pn, {weights, 0}, {b.turned, 0}, 0}, 0, 0, b.out, pn);
    for (i64 i = 0; i < n; i++)
        for (i64 c = 0; c < C; c++)
            q.mean[(member * n_rows + first + i) * C + c] =
                theta[s.amplitude + c] * (prior[i * s.outputs + c] + b.out[c * pn + i]);
    for (i64 o = 0; q.variance && o < s.n_noises; o++) {
        const double *half = q.half + (at * s.n_noises + o) * p * q.n_half;
        const bool of_rows = q.of_rows[q.place[first]];
        double *left = q.variance + (member * n_rows + first) * s.n_noises + o;
        for (i64 i = 0; i < n; i++) left[i * s.n_noises] = 0;
        for (i64 r = 0; r < q.n_half; r += PANEL_ROWS) {
            const i64 m = q.n_half - r < PANEL_ROWS ? q.n_half - r : PANEL_ROWS;
            const i64 k = of_rows || r + m > p ? p : r + m; // of a triangle no more is there
            multiply(n, m, {k, 1, pn, m, {b.turned, 0}, {half + r * p, 0}, 0}, 0, 0, b.moved, m);
            for (i64 i = 0; i < n; i++) left[i * s.n_noises] += dot_rows(m, b.moved + i * m, b.moved + i * m);
        }
        for (i64 i = 0; i < n; i++) {
            const real *row = S + i * s.columns;
            double found = left[i * s.n_noises];
            if (of_rows) found = dot_rows(s.columns, row, row) - found;
            found = found < 0 ? 0 : found; // NaN stays
            left[i * s.n_noises] = found + theta[s.noise + o];
        }
    }
}

static bool query_part(const void *given, i64 part, Arena &arena) {
    const Query &q = *(const Query *)given;
    const Job &job = q.job;
    const i64 member = part / job.n_parts, number = part % job.n_parts, n_rows = job.sets[0].width;
    const i64 begin = number * n_rows / job.n_parts, end = (number + 1) * n_rows / job.n_parts;
    const real *theta = job.theta + member * job.shape.size_with_turned;
    Features a;
    Predictions b;
    for (int round = 0; round < 2; round++) {
        if (round && !arena.reserve()) return false;
        if (!round) arena.measures = true, arena.used = 0;
        a.place(job.shape, end - begin < ROWS_AT_A_TIME ? end - begin : ROWS_AT_A_TIME, arena), b.place(job.shape, arena);
    }
    for (i64 from = begin; from < end; from += ROWS_AT_A_TIME) {
        const i64 n = end - from < ROWS_AT_A_TIME ? end - from : ROWS_AT_A_TIME;
        for (i64 i = 0; i < n; i++) a.rows[i] = {0, from + i, 1, 1};
        features(job, theta, n, a);
        for (i64 i = 0, next; i < n; i = next) {
            for (next = i + 1; next < n && q.place[from + next] == q.place[from + i];) next++;
            predict(q, member, theta, from + i, next - i, a.S + i * job.shape.columns, a.prior + i * job.shape.outputs, b);
        }
    }
    return true;
}

// what both functions are given: the parameters, as `head_pack` left them, and the rows of the first set
static void begin(const i64 *given, Job &job, i64 n_items, i64 width, i64 per_part) {
    using namespace posterior;
    describe((const i64 *)given[posterior::SIZES], (const double *)given[NUMBERS], job.shape);
    job.center = (const double *)given[CENTER], job.scale = (const double *)given[SCALE];
    job.theta = (real *)given[PACKED], job.unit = (const double *)given[UNIT];
    job.X_is_double = given[X_IS_DOUBLE];
    job.sets[0] = {(const void *)given[X], 0, 0, 0, 0, width};
    job.sets[1] = {0, 0, 0, 0, 0, 0};
    job.n_parts = (n_items + per_part - 1) / per_part;
    job.n_parts = job.n_parts > MAX_PARTS ? MAX_PARTS : job.n_parts < 1 ? 1 : job.n_parts;
}

} // namespace

bool HEAD(pack, LEVEL, REAL)(const int64_t *given) {
    Shape s;
    describe((const i64 *)given[posterior::SIZES], (const double *)given[posterior::NUMBERS], s);
    *(i64 *)given[posterior::N_PACKED] = s.n_members * s.size_with_turned;
    real *packed = (real *)given[posterior::PACKED]; // of zeros; at first only its size is asked for
    for (i64 j = 0; j < s.n_members && packed; j++)
        pack(s, (const real *const *)given[posterior::THETA], j, packed + j * s.size_with_turned);
    return true;
}

bool HEAD(condition, LEVEL, REAL)(const int64_t *given) {
    using namespace posterior;
    Conditioning q;
    q.job.n_tasks = given[posterior::N_TASKS];
    begin(given, q.job, given[posterior::N_TASKS], given[WIDTH], TASKS_PER_PART);
    q.y = (const double *)given[Y], q.root = (const double *)given[ROOT];
    q.shift = (double *)given[SHIFT], q.misfit = (double *)given[MISFIT];
    q.moved = (double *)given[MOVED], q.n_moved = (double *)given[N_MOVED];
    q.log_det = (double *)given[LOG_DET], q.n_rows = (double *)given[N_ROWS];
    q.half = (double *)given[HALF], q.n_half = given[N_HALF], q.of_rows = (bool *)given[OF_ROWS];
    q.columns = (double *)given[COLUMNS], q.roots = (double *)given[ROOTS];
    q.inverse = (double *)given[INVERSE], q.objective = (double *)given[OBJECTIVE];
    return run_blocks(&q, q.job.shape.n_members * q.job.n_parts, condition_part, given[posterior::N_THREADS]);
}

bool HEAD(query, LEVEL, REAL)(const int64_t *given) {
    using namespace posterior;
    Query q;
    begin(given, q.job, given[WIDTH], given[WIDTH], ROWS_AT_A_TIME);
    q.n_tasks = given[posterior::N_TASKS], q.n_half = given[N_HALF], q.place = (const i64 *)given[PLACE];
    q.shift = (const void *)given[SHIFT], q.half = (const double *)given[HALF];
    q.shift_is_double = given[SHIFT_IS_DOUBLE], q.of_rows = (const bool *)given[OF_ROWS];
    q.mean = (double *)given[posterior::MEAN], q.variance = (double *)given[VARIANCE];
    return run_blocks(&q, q.job.shape.n_members * q.job.n_parts, query_part, given[posterior::N_THREADS]);
}
