// What mlp.cpp and head.cpp offer to module.cpp: the same functions for each number type and
// instruction set.

#include <stdint.h>

// Each takes one array of integers and addresses, and returns false if memory ran out. The orders of
// `Argument`, `head::Argument` and `posterior::Argument` are repeated in native/__init__.py, native/head.py
// and native/posterior.py. The last three functions are there for double alone.
typedef bool Function(const int64_t *);
struct Kernels {
    Function *meta_step, *adapt, *predict, *head_step, *head_pack, *head_condition, *head_query;
};

enum Argument {
    N_TASKS, STEPS, N_RATES, SECOND_ORDER, RECOMPUTE, N_THREADS,
    SUPPORT_X, SUPPORT_Y, SUPPORT_WEIGHT, SUPPORT_LENGTHS, SUPPORT_WIDTH,
    QUERY_X, QUERY_Y, QUERY_WEIGHT, QUERY_LENGTHS, QUERY_WIDTH,
    LOSSES, OUTPUTS, SIZES, SLOPES, THETA, RATES, GRADS, RATE_GRADS, N_WEIGHTS, OWN, OWN_STRIDES,
    N_ARGUMENTS,
};

namespace head {
enum Argument {
    SIZES, NUMBERS, CENTER, SCALE, UNIT, THETA, N_TASKS, N_GIVEN, N_THREADS, X_IS_DOUBLE,
    SUPPORT_X, SUPPORT_Y, SUPPORT_WEIGHT, SUPPORT_INDEX, SUPPORT_WIDTH,
    QUERY_X, QUERY_Y, QUERY_WEIGHT, QUERY_INDEX, QUERY_WIDTH,
    UNSEEN, TASK_WEIGHT, OUTPUTS, GRADS,
    N_ARGUMENTS,
};
}

namespace posterior {
enum Argument {
    SIZES, NUMBERS, CENTER, SCALE, UNIT, THETA, PACKED, N_PACKED, N_TASKS, N_THREADS, X_IS_DOUBLE, X, WIDTH,
    Y, ROOT, SHIFT, MISFIT, MOVED, N_MOVED, LOG_DET, N_ROWS, HALF, N_HALF, OF_ROWS, PLACE, SHIFT_IS_DOUBLE, MEAN, VARIANCE,
    COLUMNS, ROOTS, INVERSE, OBJECTIVE,
    N_ARGUMENTS,
};
}

#define KERNELS(level, real) KERNELS_OF(level, real)
#define KERNELS_OF(level, real) mlp_##level##_##real
#define HEAD(name, level, real) HEAD_OF(name, level, real)
#define HEAD_OF(name, level, real) head_##name##_##level##_##real
#define DECLARE(level)                                          \
    extern const Kernels KERNELS(level, float), KERNELS(level, double); \
    Function HEAD(step, level, float), HEAD(step, level, double);       \
    Function HEAD(pack, level, double), HEAD(condition, level, double), HEAD(query, level, double)
DECLARE(base);
DECLARE(avx2);
DECLARE(avx512);
