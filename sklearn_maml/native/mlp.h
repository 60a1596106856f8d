// What mlp.cpp offers to module.cpp: the same three functions for each number type and instruction
// set.

#include <stdint.h>

// Each takes one array of integers and addresses, in the order of `Argument`, and returns false if
// memory ran out. The order is repeated in native/__init__.py.
struct Kernels {
    bool (*meta_step)(const int64_t *);
    bool (*adapt)(const int64_t *);
    bool (*predict)(const int64_t *);
};

enum Argument {
    N_TASKS, STEPS, N_RATES, SECOND_ORDER, RECOMPUTE, N_THREADS,
    SUPPORT_X, SUPPORT_Y, SUPPORT_WEIGHT, SUPPORT_LENGTHS, SUPPORT_WIDTH,
    QUERY_X, QUERY_Y, QUERY_WEIGHT, QUERY_LENGTHS, QUERY_WIDTH,
    LOSSES, OUTPUTS, SIZES, SLOPES, THETA, RATES, GRADS, RATE_GRADS, N_WEIGHTS, OWN, OWN_STRIDES,
    N_ARGUMENTS,
};

#define KERNELS(level, real) KERNELS_OF(level, real)
#define KERNELS_OF(level, real) mlp_##level##_##real
#define DECLARE(level) extern const Kernels KERNELS(level, float), KERNELS(level, double)
DECLARE(base);
DECLARE(avx2);
DECLARE(avx512);
