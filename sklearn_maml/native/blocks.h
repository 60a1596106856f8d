// Memory, and threads that take blocks of work. Included after products.h.

#include <pthread.h>

namespace {

// Places for arrays. The first round of a layout only measures, the second hands out memory.
struct Arena {
    char *begin = 0;
    size_t size = 0, used = 0;
    bool measures = false;
    real *take(i64 n) {
        char *p = measures ? 0 : begin + used;
        used += ((size_t)n * sizeof(real) + 63) / 64 * 64;
        return (real *)p;
    }
    bool reserve() { // what was measured
        size_t needed = used;
        measures = false, used = 0;
        if (needed <= size) return true;
        release();
        void *p = 0;
        if (posix_memalign(&p, 64, needed)) return false;
        begin = (char *)p, size = needed;
        return true;
    }
    void release() {
        free(begin);
        begin = 0, size = 0;
    }
    ~Arena() { free(begin); }
};

enum { MOST_THREADS = 256 };
// kept from call to call, unless they are so large that getting them anew costs little beside their
// use; those of threads that a call starts and ends are the caller's
enum { KEPT_BYTES = 1 << 25 };
static thread_local Arena arenas_of_thread[MOST_THREADS];

// Work in blocks that any thread may take. The blocks do not depend on the number of threads, and what
// they leave is put together in their order, so that neither do the results.
struct Blocks {
    const void *job;
    i64 n_blocks;
    bool (*run)(const void *job, i64 block, Arena &);
    Arena *arenas;
    i64 next_block, next_arena;
    bool failed;
};

static void *work(void *p) {
    Blocks &blocks = *(Blocks *)p;
    Arena &arena = blocks.arenas[__atomic_fetch_add(&blocks.next_arena, 1, __ATOMIC_RELAXED)];
    for (;;) {
        i64 b = __atomic_fetch_add(&blocks.next_block, 1, __ATOMIC_RELAXED);
        if (b >= blocks.n_blocks) break;
        if (!blocks.run(blocks.job, b, arena)) __atomic_store_n(&blocks.failed, true, __ATOMIC_RELAXED);
    }
    if (arena.size > KEPT_BYTES) arena.release();
    return 0;
}

static bool run_blocks(const void *job, i64 n_blocks, bool (*run)(const void *, i64, Arena &), i64 n_threads) {
    pthread_t threads[MOST_THREADS];
    Blocks blocks = {job, n_blocks, run, arenas_of_thread, 0, 0, false};
    i64 others = (n_threads < n_blocks ? n_threads : n_blocks) - 1, started = 0;
    while (started < others && started < MOST_THREADS - 1 && !pthread_create(&threads[started], 0, work, &blocks))
        started++;
    work(&blocks);
    for (i64 t = 0; t < started; t++) pthread_join(threads[t], 0);
    return !blocks.failed;
}

} // namespace
