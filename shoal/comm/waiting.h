/* What waiting for another process's word needs: shared by the C files of this folder, which are built as one library.
 *
 * A word counts what its one writer has posted. Beside it, in the same cache line, stands the core on which the writer
 * was then: whoever waits on that very core only keeps it from going on, and leaves it at once.
 */
#pragma once
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* So long a spin keeps the core for itself; where whom it waits for has to compute first, it need not for as long. */
enum { SPIN_ALONE_NS = 10000, SPIN_BRIEFLY_NS = 1000 };

static inline int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline int reached(const uint32_t *word, uint32_t target) {
    return (int32_t)(__atomic_load_n(word, __ATOMIC_ACQUIRE) - target) >= 0;
}

/* Publish what was written before. Sleepers are woken by the caller. */
static inline void publish(uint32_t *word, uint32_t value) {
    __atomic_store_n(word + 1, (uint32_t)sched_getcpu(), __ATOMIC_RELAXED);
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static inline void wake(uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0); }

/* How long somebody still waits before sleeping; `start` is 0 until it has begun to spin. */
struct patience {
    int64_t spin_ns, start;
    int yields;
};

/* Wait until a word has reached target: spin, yield, then sleep for nap_ns at most, `asleep` (a flag of mine that the
 * writer looks at after posting) set meanwhile. Whether it has. */
static inline int await_word(uint32_t *word, uint32_t target, uint32_t *asleep, struct patience *p, int64_t nap_ns) {
    for (int spins = 0; p->spin_ns > 0 && !reached(word, target); spins++) {
        int together = 0;
        if ((spins & 63) == 0) together = __atomic_load_n(word + 1, __ATOMIC_RELAXED) == (uint32_t)sched_getcpu();
        if (!together && (spins & 63) != 63) {
            relax();
            continue;
        }
        int64_t now = now_ns();
        if (p->start == 0) p->start = now;
        if (now - p->start >= p->spin_ns) break;
        if (together || now - p->start >= SPIN_ALONE_NS) sched_yield();
        /* Still together? Look again at once. */
        if (together) spins = -1;
    }
    for (; p->yields > 0 && !reached(word, target); p->yields--) sched_yield();
    if (reached(word, target)) return 1;
    if (nap_ns <= 0) return 0;
    /* Either this last look sees the word, or the writer sees the flag. */
    __atomic_store_n(asleep, 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    uint32_t seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
    if ((int32_t)(seen - target) < 0) {
        struct timespec t = {nap_ns / 1000000000, nap_ns % 1000000000};
        syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0);
    }
    __atomic_store_n(asleep, 0, __ATOMIC_RELAXED);
    return reached(word, target);
}
