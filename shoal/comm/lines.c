/* Summing and moving single lines of 64 bytes, for gradients that are zero nearly everywhere. Plain C, called through ctypes. */
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* A line is what a cache moves, and 16 floats. */
enum { LINE_BYTES = 64, PROBE_LINES = 256 };

/* Whether a line of any of the sources has a bit that is not 0. */
static inline int holds(char **src, int n, int64_t at) {
#if defined(__AVX512F__)
    __m512i any = _mm512_loadu_si512(src[0] + at);
    for (int k = 1; k < n; k++) any = _mm512_or_si512(any, _mm512_loadu_si512(src[k] + at));
    return _mm512_test_epi64_mask(any, any) != 0;
#elif defined(__AVX2__)
    __m256i any = _mm256_setzero_si256();
    for (int k = 0; k < n; k++) {
        const __m256i *half = (const __m256i *)(src[k] + at);
        any = _mm256_or_si256(any, _mm256_or_si256(_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1)));
    }
    return !_mm256_testz_si256(any, any);
#else
    uint64_t any = 0, words[LINE_BYTES / 8];
    for (int k = 0; k < n; k++) {
        memcpy(words, src[k] + at, LINE_BYTES);
        for (int i = 0; i < LINE_BYTES / 8; i++) any |= words[i];
    }
    return any != 0;
#endif
}

/* Whether more than half of every 256th line holds anything: then it is not worth looking for the others. */
static int mostly_full(char **src, int n, int64_t lines) {
    int64_t seen = 0, full = 0;
    for (int64_t line = 0; line < lines; line += PROBE_LINES, seen++) full += holds(src, n, line * LINE_BYTES);
    return full * 2 > seen;
}

/* The first line from `line` on, and before `end`, that any of the sources has marked; `end` where there is none. */
static inline int64_t next_marked(uint8_t **marks, int n, int64_t line, int64_t end) {
    for (; line + 8 <= end; line += 8) {
        uint64_t any = 0, own;
        for (int k = 0; k < n; k++) {
            memcpy(&own, marks[k] + line, 8);
            any |= own;
        }
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        if (any) return line + __builtin_ctzll(any) / 8;
#else
        if (any) return line + __builtin_clzll(any) / 8;
#endif
    }
    for (; line < end; line++)
        for (int k = 0; k < n; k++)
            if (marks[k][line]) return line;
    return end;
}

/* So many lines ahead are asked for: a peer has just written them. */
enum { AHEAD = 8 };

/* The numbers of the lines that may hold anything: the marked ones of pieces that are known, of others those that do. -1: more than most. */
static int64_t candidates(char **src, int n, uint8_t **marks, const int64_t *ends, const uint8_t *known, int64_t lines, int64_t *found,
                          int64_t most) {
    int64_t count = 0;
    for (int64_t line = 0, piece = 0; line < lines; piece++) {
        for (; line < ends[piece]; line++) {
            if (known[piece]) line = next_marked(marks, n, line, ends[piece]);
            if (line == ends[piece]) break;
            if (!known[piece] && !holds(src, n, line * LINE_BYTES)) continue;
            if (count == most) return -1;
            found[count++] = line;
        }
    }
    return count;
}

/* Sum the lines in which some source has a bit that is not 0: their numbers go to found, and (src[0] + ... + src[n-1]) * scale
 * of each, in that order, to dst. Returns how many there are, or -1 where they are more than most.
 * Where there are marks, lines come in pieces, which end at ends; of those that are known, every line that no source has marked is 0. */
#define DEFINE_SUM_LINES(NAME, T)                                                                                   \
    int64_t NAME(T *dst, char **src, int n, int64_t lines, T scale, int64_t *found, int64_t most, uint8_t **marks,  \
                 const int64_t *ends, const uint8_t *known) {                                                       \
        enum { WIDTH = LINE_BYTES / sizeof(T) };                                                                    \
        int64_t count = 0, chosen = lines;                                                                          \
        if (mostly_full(src, n, lines)) return -1;                                                                  \
        if (marks && (chosen = candidates(src, n, marks, ends, known, lines, found, most)) < 0) return -1;          \
        for (int64_t i = 0; i < chosen; i++) {                                                                      \
            const int64_t line = marks ? found[i] : i;                                                              \
            for (int k = 0; marks && i + AHEAD < chosen && k < n; k++)                                              \
                __builtin_prefetch(src[k] + found[i + AHEAD] * LINE_BYTES);                                         \
            if (!holds(src, n, line * LINE_BYTES)) continue;                                                        \
            if (count == most) return -1;                                                                           \
            T *sum = dst + count * WIDTH;                                                                           \
            const T *first = (const T *)(src[0] + line * LINE_BYTES);                                               \
            for (int i = 0; i < WIDTH; i++) sum[i] = first[i];                                                      \
            for (int k = 1; k < n; k++) {                                                                           \
                const T *next = (const T *)(src[k] + line * LINE_BYTES);                                            \
                for (int i = 0; i < WIDTH; i++) sum[i] += next[i];                                                  \
            }                                                                                                       \
            for (int i = 0; i < WIDTH; i++) sum[i] *= scale;                                                        \
            found[count++] = line;                                                                                  \
        }                                                                                                           \
        return count;                                                                                               \
    }
DEFINE_SUM_LINES(shoal_sum_lines_f32, float)
DEFINE_SUM_LINES(shoal_sum_lines_f64, double)

/* Gather lines into a row, and put them back. */
void shoal_take_lines(char *row, const char *from, const int64_t *lines, int64_t n) {
    for (int64_t i = 0; i < n; i++) memcpy(row + i * LINE_BYTES, from + lines[i] * LINE_BYTES, LINE_BYTES);
}

void shoal_put_lines(char *to, const char *row, const int64_t *lines, int64_t n) {
    for (int64_t i = 0; i < n; i++) memcpy(to + lines[i] * LINE_BYTES, row + i * LINE_BYTES, LINE_BYTES);
}

/* dst[rows[i]] += src[i], one after the other; rows that are skipped or beyond the table are left out. */
#define DEFINE_ADD_ROWS(NAME, T)                                                                          \
    void NAME(T *dst, const T *src, const int64_t *rows, int64_t n, int64_t width, int64_t count, int64_t skipped) { \
        for (int64_t i = 0; i < n; i++) {                                                                 \
            if (rows[i] < 0 || rows[i] >= count || rows[i] == skipped) continue;                          \
            T *sum = dst + rows[i] * width;                                                               \
            const T *next = src + i * width;                                                              \
            for (int64_t k = 0; k < width; k++) sum[k] += next[k];                                        \
        }                                                                                                 \
    }
DEFINE_ADD_ROWS(shoal_add_rows_f32, float)
DEFINE_ADD_ROWS(shoal_add_rows_f64, double)

/* Rows of a table: set them to zero, and copy them from another table; those beyond the table are left out. */
void shoal_clear_rows(char *table, const int64_t *rows, int64_t n, int64_t bytes, int64_t count) {
    for (int64_t i = 0; i < n; i++)
        if (rows[i] >= 0 && rows[i] < count) memset(table + rows[i] * bytes, 0, bytes);
}

/* Mark the lines that rows of a table lie in, or take their marks away; the table begins with a line. */
void shoal_mark_rows(uint8_t *marks, const int64_t *rows, int64_t n, int64_t bytes, int64_t count, int64_t mark) {
    for (int64_t i = 0; i < n; i++) {
        if (rows[i] < 0 || rows[i] >= count || !bytes) continue;
        for (int64_t line = rows[i] * bytes / LINE_BYTES; line <= (rows[i] * bytes + bytes - 1) / LINE_BYTES; line++)
            marks[line] = mark;
    }
}

void shoal_copy_rows(char *table, const char *from, const int64_t *rows, int64_t n, int64_t bytes, int64_t count) {
    for (int64_t i = 0; i < n; i++)
        if (rows[i] >= 0 && rows[i] < count) memcpy(table + rows[i] * bytes, from + rows[i] * bytes, bytes);
}

/* Put the rows of a table that holds nothing but others' (`old`) in their place: these are cleared, the new ones copied, and the marks of
 * their lines, where there are any, kept. exact: a line is marked where it is of an old row, and nowhere else; then rows that are whole
 * lines and come several times are touched once. The table begins with a line. */
void shoal_exchange_rows(char *table, const char *from, const int64_t *old, int64_t olds, const int64_t *rows, int64_t n, int64_t bytes,
                         int64_t count, uint8_t *marks, int64_t exact) {
    if (!marks || !exact || !bytes || bytes % LINE_BYTES) {
        shoal_clear_rows(table, old, olds, bytes, count);
        if (marks) shoal_mark_rows(marks, old, olds, bytes, count, 0);
        shoal_copy_rows(table, from, rows, n, bytes, count);
        if (marks) shoal_mark_rows(marks, rows, n, bytes, count, 1);
        return;
    }
    const int64_t lines = bytes / LINE_BYTES;
    for (int64_t i = 0; i < olds; i++) {
        if (old[i] < 0 || old[i] >= count || !marks[old[i] * lines]) continue;
        memset(marks + old[i] * lines, 0, lines);
        memset(table + old[i] * bytes, 0, bytes);
    }
    for (int64_t i = 0; i < n; i++) {
        if (rows[i] < 0 || rows[i] >= count || marks[rows[i] * lines]) continue;
        memset(marks + rows[i] * lines, 1, lines);
        memcpy(table + rows[i] * bytes, from + rows[i] * bytes, bytes);
    }
}

/* A step of an optimizer on single lines where they lie: grads holds their gradients one after the other. Whether torch's own
 * kernel rounds once or twice where it multiplies and adds depends on how it was built, so there is one of either kind. */
#define SGD_ONCE(T, FMA) w[k] = FMA(-rate, g, w[k])
#define SGD_TWICE(T, FMA) w[k] = w[k] - rate * g
#define DEFINE_SGD(NAME, T, FMA, MOVE)                                                                             \
    void NAME(char *weights, const T *grads, const int64_t *lines, int64_t n, T scale, T rate) {                   \
        enum { WIDTH = LINE_BYTES / sizeof(T) };                                                                   \
        for (int64_t i = 0; i < n; i++) {                                                                          \
            T *w = (T *)(weights + lines[i] * LINE_BYTES);                                                         \
            for (int k = 0; k < WIDTH; k++) {                                                                      \
                T g = grads[i * WIDTH + k] * scale;                                                                \
                MOVE(T, FMA);                                                                                      \
            }                                                                                                      \
        }                                                                                                          \
    }
DEFINE_SGD(shoal_sgd_lines_once_f32, float, __builtin_fmaf, SGD_ONCE)
DEFINE_SGD(shoal_sgd_lines_once_f64, double, __builtin_fma, SGD_ONCE)
DEFINE_SGD(shoal_sgd_lines_twice_f32, float, __builtin_fmaf, SGD_TWICE)
DEFINE_SGD(shoal_sgd_lines_twice_f64, double, __builtin_fma, SGD_TWICE)

#define SQUARE_ONCE(T, FMA) FMA(g, g, s[k])
#define SQUARE_TWICE(T, FMA) (s[k] + g * g)
#define DEFINE_ADAGRAD(NAME, T, FMA, ROOT, ADD_SQUARE)                                                             \
    void NAME(char *weights, char *squares, const T *grads, const int64_t *lines, int64_t n, T scale, T rate, T eps) { \
        enum { WIDTH = LINE_BYTES / sizeof(T) };                                                                   \
        for (int64_t i = 0; i < n; i++) {                                                                          \
            T *w = (T *)(weights + lines[i] * LINE_BYTES), *s = (T *)(squares + lines[i] * LINE_BYTES);            \
            for (int k = 0; k < WIDTH; k++) {                                                                      \
                T g = grads[i * WIDTH + k] * scale;                                                                \
                s[k] = ADD_SQUARE(T, FMA);                                                                         \
                w[k] = w[k] - rate * g / (ROOT(s[k]) + eps);                                                       \
            }                                                                                                      \
        }                                                                                                          \
    }
DEFINE_ADAGRAD(shoal_adagrad_lines_once_f32, float, __builtin_fmaf, __builtin_sqrtf, SQUARE_ONCE)
DEFINE_ADAGRAD(shoal_adagrad_lines_once_f64, double, __builtin_fma, __builtin_sqrt, SQUARE_ONCE)
DEFINE_ADAGRAD(shoal_adagrad_lines_twice_f32, float, __builtin_fmaf, __builtin_sqrtf, SQUARE_TWICE)
DEFINE_ADAGRAD(shoal_adagrad_lines_twice_f64, double, __builtin_fma, __builtin_sqrt, SQUARE_TWICE)
