/* Waiting and summing for the shared-memory arena. Plain C, no headers of torch or Python, called through ctypes.
 *
 * Memory order: a word is written by one process only. A release store publishes everything that its writer wrote
 * before it; an acquire load that sees the word sees all of that. On x86 both are plain moves.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "waiting.h"

/* Publish value and wake whoever sleeps on the word. */
void shoal_post(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
    wake(word);
}

/* Wait until each of n words, stride bytes apart, has reached target. Returns -1, or after timeout_ns the index of the
 * first word that has not. Spins for spin_ns at first, then sleeps in the kernel. */
int shoal_wait_all(char *base, int64_t stride, int n, uint32_t target, int64_t spin_ns, int64_t timeout_ns) {
    int64_t start = now_ns();
    for (int i = 0; i < n; i++) {
        uint32_t *word = (uint32_t *)(base + i * stride);
        int spins = 0;
        while (!reached(word, target)) {
            int64_t waited = 0;
            if ((++spins & 63) == 0 || spin_ns == 0) waited = now_ns() - start;
            if (waited >= timeout_ns) return i;
            if (spin_ns > 0 && waited < spin_ns) {
                relax();
                /* Whom this waits for may have to share the core with it. */
                if (waited >= SPIN_BRIEFLY_NS) sched_yield();
                continue;
            }
            uint32_t seen = __atomic_load_n(word, __ATOMIC_ACQUIRE);
            if ((int32_t)(seen - target) >= 0) break;
            int64_t left = timeout_ns - waited;
            struct timespec t = {left / 1000000000, left % 1000000000};
            syscall(SYS_futex, word, FUTEX_WAIT, seen, &t, NULL, 0);
            if (now_ns() - start >= timeout_ns && !reached(word, target)) return i;
        }
    }
    return -1;
}

/* Wait until some of n words differs from its fellow; both lie stride bytes apart. Its index, or -1 after spin_ns: whoever
 * waits longer than that sleeps on something else. */
int shoal_wait_any(const char *base, int64_t stride, const char *fellows, int64_t fellow_stride, int n, int64_t spin_ns) {
    int64_t start = 0;
    for (int spins = 0;; spins++) {
        for (int i = 0; i < n; i++) {
            const uint32_t *word = (const uint32_t *)(base + i * stride), *fellow = (const uint32_t *)(fellows + i * fellow_stride);
            if (__atomic_load_n(word, __ATOMIC_ACQUIRE) != __atomic_load_n(fellow, __ATOMIC_ACQUIRE)) return i;
        }
        if (spin_ns <= 0) return -1;
        relax();
        if ((spins & 15) != 0) continue;
        int64_t now = now_ns();
        if (start == 0) start = now;
        if (now - start >= spin_ns) return -1;
        if (now - start >= SPIN_BRIEFLY_NS) sched_yield();
    }
}

/* Results from here on do not stay in a cache anyway: written past it, their old contents need not be read first. */
enum { STREAM_BYTES = 8 << 20 };

/* Whether to write a result past the caches. */
static inline int streams(const void *dst, int64_t bytes) {
#if defined(__SSE2__)
    return bytes >= STREAM_BYTES && ((uintptr_t)dst & 15) == 0;
#else
    return (void)dst, (void)bytes, 0;
#endif
}

/* Write a block past the caches; both ends are 16-byte aligned. */
static inline void stream_block(void *dst, const void *block, int64_t bytes) {
#if defined(__SSE2__)
    int64_t whole = bytes / 16;
    for (int64_t i = 0; i < whole; i++) _mm_stream_si128((__m128i *)dst + i, _mm_load_si128((const __m128i *)block + i));
    memcpy((char *)dst + whole * 16, (const char *)block + whole * 16, bytes - whole * 16);
#else
    memcpy(dst, block, bytes);
#endif
}

/* Such stores are not ordered with others: a post that follows must not overtake them. */
static inline void finish_stream(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* dst = (src[0] + src[1] + ... + src[n-1]) * scale, summed in that order, element by element. dst may be a source. */
#define DEFINE_SUM(NAME, T)                                                         \
    void NAME(T *dst, T **src, int n, int64_t count, T scale) {                     \
        enum { BLOCK = 2048 };                                                      \
        T sum[BLOCK] __attribute__((aligned(64)));                                  \
        int stream = n > 1 && streams(dst, count * (int64_t)sizeof(T));             \
        for (int64_t at = 0; at < count; at += BLOCK) {                             \
            int64_t m = count - at < BLOCK ? count - at : BLOCK;                    \
            const T *first = src[0] + at;                                           \
            if (n == 1) {                                                           \
                for (int64_t i = 0; i < m; i++) dst[at + i] = first[i] * scale;     \
                continue;                                                           \
            }                                                                       \
            const T *second = src[1] + at;                                          \
            for (int64_t i = 0; i < m; i++) sum[i] = first[i] + second[i];          \
            for (int k = 2; k < n; k++) {                                           \
                const T *next = src[k] + at;                                        \
                for (int64_t i = 0; i < m; i++) sum[i] += next[i];                  \
            }                                                                       \
            if (stream) {                                                           \
                for (int64_t i = 0; i < m; i++) sum[i] *= scale;                    \
                stream_block(dst + at, sum, m * (int64_t)sizeof(T));                \
                continue;                                                           \
            }                                                                       \
            for (int64_t i = 0; i < m; i++) dst[at + i] = sum[i] * scale;           \
        }                                                                           \
        if (stream) finish_stream();                                                \
    }
DEFINE_SUM(shoal_sum_f32, float)
DEFINE_SUM(shoal_sum_f64, double)
