/* Passes over whole tensors, each once through memory: copying, looking for what is no number, a step of SGD. Plain C. */
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

/* What does not stay in a cache anyway is written past it: its old contents need not be read first. */
enum { PAST_CACHE_BYTES = 8 << 20, LOOK_BYTES = 1024, STEP_BYTES = 8192 };

/* As much as one store moves past the caches. */
#if defined(__AVX512F__)
enum { STORE_BYTES = 64 };
static inline void store_past(char *dst, const char *src) { _mm512_stream_si512((void *)dst, _mm512_loadu_si512(src)); }
#elif defined(__AVX__)
enum { STORE_BYTES = 32 };
static inline void store_past(char *dst, const char *src) {
    _mm256_stream_si256((__m256i *)dst, _mm256_loadu_si256((const __m256i *)src));
}
#elif defined(__SSE2__)
enum { STORE_BYTES = 16 };
static inline void store_past(char *dst, const char *src) {
    _mm_stream_si128((__m128i *)dst, _mm_loadu_si128((const __m128i *)src));
}
#else
enum { STORE_BYTES = 0 };
static inline void store_past(char *dst, const char *src) { (void)dst, (void)src; }
#endif

/* Copy a block past the caches. */
static inline void copy_past(char *dst, const char *src, int64_t bytes) {
    int64_t at = 0;
    for (; STORE_BYTES && at + STORE_BYTES <= bytes; at += STORE_BYTES) store_past(dst + at, src + at);
    memcpy(dst + at, src + at, bytes - at);
}

static inline int goes_past(const void *dst, int64_t bytes) {
    return STORE_BYTES && bytes >= PAST_CACHE_BYTES && ((uintptr_t)dst & (STORE_BYTES - 1)) == 0;
}

/* Such stores are not ordered with others: what is posted afterwards must not overtake them. */
static inline void finish_past(void) {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

void shoal_copy(char *dst, const char *src, int64_t bytes) {
    if (!goes_past(dst, bytes)) {
        memcpy(dst, src, bytes);
        return;
    }
    copy_past(dst, src, bytes);
    finish_past();
}

/* Copy n stretches while nobody writes to them. *version is odd while somebody does, who does not begin while *reading is set,
 * unless it was for too long; so it is looked at again afterwards. Returns the version that the copy is of, or -1 where there
 * was none just then: *reading stays set. */
int64_t shoal_pull(uint32_t *version, uint32_t *reading, int n, char **dst, char **src, const int64_t *bytes) {
    __atomic_store_n(reading, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        uint32_t before = __atomic_load_n(version, __ATOMIC_SEQ_CST);
        if (before & 1) return -1;
        for (int k = 0; k < n; k++) shoal_copy(dst[k], src[k], bytes[k]);
        __atomic_thread_fence(__ATOMIC_ACQ_REL);
        if (__atomic_load_n(version, __ATOMIC_RELAXED) != before) continue;
        __atomic_store_n(reading, 0, __ATOMIC_RELEASE);
        return before;
    }
}

/* Whether all of n numbers are finite: of those that are not, every bit of the exponent is set. With dst, they are copied there. */
#define DEFINE_FINITE(NAME, T, EXPONENT)                                       \
    int NAME(T *dst, const T *src, int64_t n) {                                \
        enum { BLOCK = LOOK_BYTES / sizeof(T) };                               \
        int past = dst && goes_past(dst, n * (int64_t)sizeof(T));              \
        T any = 0;                                                             \
        for (int64_t at = 0; at < n; at += BLOCK) {                            \
            int64_t m = n - at < BLOCK ? n - at : BLOCK;                       \
            const T *block = src + at;                                         \
            T found = 0;                                                       \
            for (int64_t i = 0; i < m; i++) found |= (block[i] & EXPONENT) == EXPONENT; \
            any |= found;                                                      \
            if (past)                                                          \
                copy_past((char *)(dst + at), (const char *)block, m * (int64_t)sizeof(T)); \
            else if (dst)                                                      \
                memcpy(dst + at, block, m * sizeof(T));                        \
        }                                                                      \
        if (past) finish_past();                                               \
        return any == 0;                                                       \
    }
DEFINE_FINITE(shoal_finite_f32, uint32_t, 0x7f800000u)
DEFINE_FINITE(shoal_finite_f64, uint64_t, 0x7ff0000000000000ull)

/* Whether this processor multiplies and adds with one rounding, as torch's kernels do where it can. */
int shoal_has_fma(void) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return 1;
#else
    return 0;
#endif
}

/* Publish how many bytes of the weights the undo log holds: before any of them is changed, and after all of them are there. */
static inline void say_saved(double *saved, int64_t bytes) {
    double value = (double)bytes;
    uint64_t word;
    memcpy(&word, &value, sizeof word);
    __atomic_store_n((uint64_t *)saved, word, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

/* A step of plain SGD over a chunk: w = fma(rate, (src[0] + ... + src[n-1]) * factor * scale, w), element by element.
 *
 * The chunk has `pieces` pieces, [spans[2k], spans[2k+1]) in elements, with a rate (minus the learning rate) each; what lies
 * between them stays as it is. With undo, each block is copied there, at its own place, before it is changed, and *saved says
 * how many of the chunk's first bytes are there. */
#define DEFINE_SGD(NAME, T, FMA)                                                                           \
    void NAME(T *w, T **src, int n, const int64_t *spans, const T *rates, int pieces, T factor, T scale,   \
              T *undo, double *saved) {                                                                    \
        enum { BLOCK = STEP_BYTES / sizeof(T) };                                                          \
        T sum[BLOCK] __attribute__((aligned(64)));                                                         \
        int64_t held = 0;                                                                                  \
        for (int k = 0; k < pieces; k++) {                                                                 \
            T rate = rates[k];                                                                             \
            for (int64_t at = spans[2 * k]; at < spans[2 * k + 1]; at += BLOCK) {                          \
                int64_t left = spans[2 * k + 1] - at, m = left < BLOCK ? left : BLOCK;                     \
                T *own = w + at;                                                                           \
                const T *g = src[0] + at;                                                                  \
                if (undo) {                                                                                \
                    memcpy(undo + held, w + held, (at + m - held) * sizeof(T));                            \
                    held = at + m;                                                                         \
                    say_saved(saved, held * (int64_t)sizeof(T));                                           \
                }                                                                                          \
                if (n == 1 && factor == 1 && scale == 1) {                                                 \
                    for (int64_t i = 0; i < m; i++) own[i] = FMA(rate, g[i], own[i]);                      \
                    continue;                                                                              \
                }                                                                                          \
                for (int64_t i = 0; i < m; i++) sum[i] = g[i];                                             \
                for (int s = 1; s < n; s++) {                                                              \
                    const T *next = src[s] + at;                                                           \
                    for (int64_t i = 0; i < m; i++) sum[i] += next[i];                                     \
                }                                                                                          \
                for (int64_t i = 0; i < m; i++) own[i] = FMA(rate, sum[i] * factor * scale, own[i]);       \
            }                                                                                              \
        }                                                                                                  \
    }
DEFINE_SGD(shoal_sgd_f32, float, __builtin_fmaf)
DEFINE_SGD(shoal_sgd_f64, double, __builtin_fma)
