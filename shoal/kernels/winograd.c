/* 3 × 3 convolution, stride 1, padding 1, by Winograd's minimal filtering F(4 × 4, 3 × 3): a quarter of the multiplications.
 * Included once for float, once for double.
 *
 * Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4: each 6 × 6 tile d of the input, with
 * 4 × 4 outputs, gives A^T [ (G g G^T) * (B^T d B) ] A; summed over channels, the product is 36 matrix products of (tiles,
 * channels) with (channels, outputs). The interpolation points are 0, ±sqrt(1/2), ±sqrt(2) and infinity in place of the paper's
 * 0, ±1, ±2: their products are 1, so numbers stay near each other, and rounding is about a quarter (docs/log.md).
 *
 * Pictures are (images, rows, columns, channels). All vectors run over channels, which must be whole vectors. Tiles are worked on
 * in blocks that stay in the cache. The portable vector types of GCC and clang become AVX-512, AVX2, NEON or plain code.
 */
#ifndef T
#include <string.h>

#define SELF "winograd.c"
#include "vectors.h"

/* Sums of 6 rows by PANEL vectors stay in registers: 24 of 32, or 12 of 16. */
enum { POINTS = 36, ROWS = 6, GROUP = 24 };
/* A line of memory between the matrices of two points: at whole powers of two they would all claim the same places in the cache. */
#define APART(size) ((size) + LANES)

typedef struct {
    int64_t images, height, width, channels, outputs, block;
} Shape;

/* Between outputs, channels and taps of a weight, in elements; taps may be taken in reverse. */
typedef struct {
    int64_t output, channel, tap;
} Strides;

int shoal_winograd_lanes(int itemsize) { return VECTOR_BYTES / itemsize; }

int shoal_winograd_panel(int itemsize) { return PANEL * VECTOR_BYTES / itemsize; }

#include "twice.h"
#else
#include "vectors.h"

#define WIDTH (PANEL * LANES)
#define AT(p) (*(V *)(p))
#define OF(p) (*(const V *)(p))
#define ROOT ((T)1.41421356237309504880)

/* The four small matrices. Each takes and gives vectors with a stride. */

INLINE void NAME(input_line)(const V *d, const int from, V *out, const int to) { /* B^T */
    const V even = d[4 * from] - (T)2 * d[2 * from], odd = ROOT / 2 * (d[3 * from] - (T)2 * d[from]);
    const V more = d[4 * from] - (T)0.5 * d[2 * from], less = ROOT * (d[3 * from] - (T)0.5 * d[from]);
    out[0] = d[0] - (T)2.5 * d[2 * from] + d[4 * from];
    out[to] = even + odd;
    out[2 * to] = even - odd;
    out[3 * to] = more + less;
    out[4 * to] = more - less;
    out[5 * to] = d[from] - (T)2.5 * d[3 * from] + d[5 * from];
}

INLINE void NAME(output_line)(const V *m, const int from, V *out, const int to) { /* A^T */
    const V near = m[from] + m[2 * from], far = m[3 * from] + m[4 * from];
    const V across = ROOT / 2 * (m[from] - m[2 * from]), wide = ROOT * (m[3 * from] - m[4 * from]);
    out[0] = m[0] + near + far;
    out[to] = across + wide;
    out[2 * to] = (T)0.5 * near + (T)2 * far;
    out[3 * to] = (T)0.5 * across + (T)2 * wide + m[5 * from];
}

INLINE void NAME(gradient_line)(const V *y, const int from, V *out, const int to) { /* A */
    const V even = y[0] + (T)0.5 * y[2 * from], odd = ROOT / 2 * (y[from] + (T)0.5 * y[3 * from]);
    const V more = y[0] + (T)2 * y[2 * from], less = ROOT * (y[from] + (T)2 * y[3 * from]);
    out[0] = y[0];
    out[to] = even + odd;
    out[2 * to] = even - odd;
    out[3 * to] = more + less;
    out[4 * to] = more - less;
    out[5 * to] = y[3 * from];
}

INLINE void NAME(weight_line)(const V *g, const int from, V *out, const int to) { /* G */
    const T third = (T)1 / 3, sixth = (T)1 / 6;
    const V even = -third * ((T)2 * g[0] + g[2 * from]), odd = -third * ROOT * g[from];
    const V more = sixth * (g[0] + (T)2 * g[2 * from]), less = sixth * ROOT * g[from];
    out[0] = g[0];
    out[to] = even + odd;
    out[2 * to] = even - odd;
    out[3 * to] = more + less;
    out[4 * to] = more - less;
    out[5 * to] = g[2 * from];
}

INLINE void NAME(weight_gradient_line)(const V *u, const int from, V *out, const int to) { /* G^T */
    const T third = (T)1 / 3, sixth = (T)1 / 6;
    const V near = third * (u[from] + u[2 * from]), far = sixth * (u[3 * from] + u[4 * from]);
    out[0] = u[0] - (T)2 * near + far;
    out[to] = ROOT * (sixth * (u[3 * from] - u[4 * from]) - third * (u[from] - u[2 * from]));
    out[2 * to] = (T)2 * far - near + u[5 * from];
}

/* c (rows, blocks vectors) = or += the sum over `depth` of a(row, d) * b(d, vectors). */
INLINE void NAME(product)(
    const T *a, int64_t a_row, int64_t a_step, const T *b, int64_t b_step, T *c, int64_t c_row, int64_t depth, int add, const int rows,
    const int blocks) {
    V sum[ROWS][PANEL];
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < blocks; k++) sum[r][k] = add ? OF(c + r * c_row + k * LANES) : (V){};
    for (int64_t d = 0; d < depth; d++, a += a_step, b += b_step) {
        V w[PANEL];
        for (int k = 0; k < blocks; k++) w[k] = OF(b + k * LANES);
        for (int r = 0; r < rows; r++) {
            const V value = a[r * a_row] - (V){};
            for (int k = 0; k < blocks; k++) sum[r][k] += value * w[k];
        }
    }
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < blocks; k++) AT(c + r * c_row + k * LANES) = sum[r][k];
}

#define CASE(R, B) case (R) * 8 + (B): NAME(product)(a, a_row, a_step, b, b_step, c, c_row, depth, add, R, B); break;
#if defined(__AVX512F__)
#define CASES(R) CASE(R, 1) CASE(R, 2) CASE(R, 3) CASE(R, 4)
#else
#define CASES(R) CASE(R, 1) CASE(R, 2)
#endif

static __attribute__((noinline)) void NAME(panel)(
    const T *a, int64_t a_row, int64_t a_step, const T *b, int64_t b_step, T *c, int64_t c_row, int64_t depth, int64_t rows, int64_t wide,
    int add) {
    const int blocks = (int)(wide / LANES);
    for (int64_t r = 0; r < rows; r += ROWS, a += ROWS * a_row, c += ROWS * c_row) {
        const int some = rows - r < ROWS ? (int)(rows - r) : ROWS;
        switch (some * 8 + blocks) { CASES(1) CASES(2) CASES(3) CASES(4) CASES(5) CASES(6) }
    }
}

/* Where a tile's 6 × 6 (or 4 × 4, from `first` on) pixels are; `nothing` for those outside of the picture. */
INLINE void NAME(find)(const Shape *s, const T *x, int64_t depth, int64_t tile, int first, int size, const T *nothing, const T **found) {
    const int64_t wide = (s->width + 3) / 4, high = (s->height + 3) / 4;
    const int64_t top = tile / wide % high * 4 + first, left = tile % wide * 4 + first;
    const T *image = x + tile / (wide * high) * s->height * s->width * depth;
    for (int y = 0; y < size; y++)
        for (int z = 0; z < size; z++) {
            const int64_t row = top + y, column = left + z;
            const int inside = row >= 0 && row < s->height && column >= 0 && column < s->width;
            found[y * size + z] = inside ? image + (row * s->width + column) * depth : nothing;
        }
}

/* out (36, count, channels): B^T d B of tiles. */
static void NAME(take_input)(const Shape *s, const T *x, int64_t first, int64_t count, const T *nothing, T *out) {
    for (int64_t t = 0; t < count; t++) {
        const T *from[36];
        NAME(find)(s, x, s->channels, first + t, -1, 6, nothing, from);
        for (int64_t c = 0; c < s->channels; c += LANES) {
            V half[36], whole[6];
            for (int z = 0; z < 6; z++) {
                for (int y = 0; y < 6; y++) whole[y] = OF(from[y * 6 + z] + c);
                NAME(input_line)(whole, 1, half + z, 6);
            }
            T *to = out + t * s->channels + c;
            for (int y = 0; y < 6; y++) {
                NAME(input_line)(half + y * 6, 1, whole, 1);
                for (int z = 0; z < 6; z++) AT(to + (y * 6 + z) * APART(count * s->channels)) = whole[z];
            }
        }
    }
}

/* out (36, count, outputs): A dY A^T of tiles. */
static void NAME(take_gradient)(const Shape *s, const T *x, int64_t first, int64_t count, const T *nothing, T *out) {
    for (int64_t t = 0; t < count; t++) {
        const T *from[16];
        NAME(find)(s, x, s->outputs, first + t, 0, 4, nothing, from);
        for (int64_t c = 0; c < s->outputs; c += LANES) {
            V half[24], whole[6];
            for (int z = 0; z < 4; z++) {
                for (int y = 0; y < 4; y++) whole[y] = OF(from[y * 4 + z] + c);
                NAME(gradient_line)(whole, 1, half + z, 4);
            }
            T *to = out + t * s->outputs + c;
            for (int y = 0; y < 6; y++) {
                NAME(gradient_line)(half + y * 4, 1, whole, 1);
                for (int z = 0; z < 6; z++) AT(to + (y * 6 + z) * APART(count * s->outputs)) = whole[z];
            }
        }
    }
}

/* A^T m A of (36, count, wide), and a bias, into channels k to k + wide of a picture. */
static void NAME(give_output)(const Shape *s, const T *m, int64_t first, int64_t count, int64_t k, int64_t wide, const T *bias, T *out) {
    const int64_t across = (s->width + 3) / 4, down = (s->height + 3) / 4;
    for (int64_t t = 0; t < count; t++) {
        const int64_t tile = first + t, top = tile / across % down * 4, left = tile % across * 4;
        T *image = out + tile / (across * down) * s->height * s->width * s->outputs + k;
        const int rows = s->height - top < 4 ? (int)(s->height - top) : 4, columns = s->width - left < 4 ? (int)(s->width - left) : 4;
        for (int64_t c = 0; c < wide; c += LANES) {
            V half[24], whole[6];
            for (int z = 0; z < 6; z++) {
                for (int y = 0; y < 6; y++) whole[y] = OF(m + (y * 6 + z) * APART(count * wide) + t * wide + c);
                NAME(output_line)(whole, 1, half + z, 6);
            }
            const V more = bias ? OF(bias + k + c) : (V){};
            for (int y = 0; y < rows; y++) {
                T *to = image + ((top + y) * s->width + left) * s->outputs + c;
                NAME(output_line)(half + y * 6, 1, whole, 1);
                for (int z = 0; z < columns; z++) AT(to + z * s->outputs) = whole[z] + more;
            }
        }
    }
}

/* Weights of `some` channels and `wide` outputs between their own strides and (channels, 9, WIDTH), in the order of memory. */
static void NAME(gather)(const T *weight, const Strides *by, int64_t some, int64_t wide, T taps[][9][WIDTH]) {
    if (by->output == 1)
        for (int64_t i = 0; i < some; i++)
            for (int q = 0; q < 9; q++)
                for (int64_t j = 0; j < wide; j += LANES) AT(&taps[i][q][j]) = OF(weight + i * by->channel + q * by->tap + j);
    else if (by->channel == 1)
        for (int64_t j = 0; j < wide; j++)
            for (int q = 0; q < 9; q++)
                for (int64_t i = 0; i < some; i++) taps[i][q][j] = weight[j * by->output + q * by->tap + i];
    else
        for (int64_t j = 0; j < wide; j++)
            for (int64_t i = 0; i < some; i++)
                for (int q = 0; q < 9; q++) taps[i][q][j] = weight[j * by->output + i * by->channel + q * by->tap];
}

static void NAME(scatter)(T taps[][9][WIDTH], const Strides *by, int64_t some, int64_t wide, T *weight) {
    if (by->channel == 1)
        for (int64_t j = 0; j < wide; j++)
            for (int q = 0; q < 9; q++)
                for (int64_t i = 0; i < some; i++) weight[j * by->output + q * by->tap + i] = taps[i][q][j];
    else
        for (int64_t j = 0; j < wide; j++)
            for (int64_t i = 0; i < some; i++)
                for (int q = 0; q < 9; q++) weight[j * by->output + i * by->channel + q * by->tap] = taps[i][q][j];
}

/* G g G^T of at most GROUP channels and `wide` outputs, into (36, at most GROUP channels, wide) with `apart` between points. */
static void NAME(take_weight)(const T *weight, const Strides *by, int64_t some, int64_t wide, T *out, int64_t apart) {
    T taps[GROUP][9][WIDTH];
    NAME(gather)(weight, by, some, wide, taps);
    for (int64_t i = 0; i < some; i++)
        for (int64_t j = 0; j < wide; j += LANES) {
            V half[18], whole[6];
            for (int z = 0; z < 3; z++) {
                for (int y = 0; y < 3; y++) whole[y] = OF(&taps[i][y * 3 + z][j]);
                NAME(weight_line)(whole, 1, half + z, 3);
            }
            for (int y = 0; y < 6; y++) {
                NAME(weight_line)(half + y * 3, 1, whole, 1);
                for (int z = 0; z < 6; z++) AT(out + (y * 6 + z) * apart + i * wide + j) = whole[z];
            }
        }
}

/* G^T dU G of (36, some channels, wide outputs) into the gradient of a weight. */
static void NAME(give_weight)(const T *u, int64_t some, int64_t wide, const Strides *by, T *weight) {
    T taps[GROUP][9][WIDTH];
    for (int64_t i = 0; i < some; i++)
        for (int64_t j = 0; j < wide; j += LANES) {
            V half[18], whole[6];
            for (int z = 0; z < 6; z++) {
                for (int y = 0; y < 6; y++) whole[y] = OF(u + ((y * 6 + z) * some + i) * wide + j);
                NAME(weight_gradient_line)(whole, 1, half + z, 6);
            }
            for (int y = 0; y < 3; y++) {
                NAME(weight_gradient_line)(half + y * 6, 1, whole, 1);
                for (int z = 0; z < 3; z++) AT(&taps[i][y * 3 + z][j]) = whole[z];
            }
        }
    NAME(scatter)(taps, by, some, wide, weight);
}

/* All weights transformed: panels of (36, channels, up to WIDTH outputs), one behind the other, 36 * APART(channels * WIDTH) each. */
void NAME(shoal_winograd_weights)(const Shape *s, const T *weight, const Strides *by, T *out) {
    for (int64_t k = 0; k < s->outputs; k += WIDTH, out += POINTS * APART(s->channels * WIDTH))
        for (int64_t c = 0; c < s->channels; c += GROUP) {
            const int64_t wide = s->outputs - k < WIDTH ? s->outputs - k : WIDTH, some = s->channels - c < GROUP ? s->channels - c : GROUP;
            NAME(take_weight)(weight + k * by->output + c * by->channel, by, some, wide, out + c * wide, APART(s->channels * WIDTH));
        }
}

/* scratch: channels + 36 * (APART(block * channels) + APART(block * WIDTH) + APART(GROUP * WIDTH)) numbers. `ready` is what
 * shoal_winograd_weights gave, or null where all tiles are one block: then weights are transformed where they are used, since the
 * transformed ones of a deep layer, four times as large, would have to go through memory. */
void NAME(shoal_winograd_forward)(
    const Shape *s, const T *x, const T *weight, const Strides *by, const T *ready, const T *bias, T *out, T *scratch) {
    const int64_t tiles = s->images * ((s->height + 3) / 4) * ((s->width + 3) / 4), C = s->channels;
    T *input = scratch + C, *product = input + POINTS * APART(s->block * C), *group = product + POINTS * APART(s->block * WIDTH);
    memset(scratch, 0, C * sizeof(T));
    for (int64_t first = 0; first < tiles; first += s->block) {
        const int64_t count = tiles - first < s->block ? tiles - first : s->block;
        NAME(take_input)(s, x, first, count, scratch, input);
        for (int64_t k = 0; k < s->outputs; k += WIDTH) {
            const int64_t wide = s->outputs - k < WIDTH ? s->outputs - k : WIDTH;
            const int64_t depth = ready || C < GROUP ? C : GROUP;
            for (int64_t c = 0; c < C; c += depth) {
                const int64_t some = C - c < depth ? C - c : depth;
                const int64_t apart = ready ? APART(C * WIDTH) : APART(GROUP * WIDTH);
                const T *panel = ready ? ready + k / WIDTH * POINTS * apart : group;
                if (!ready) NAME(take_weight)(weight + k * by->output + c * by->channel, by, some, wide, group, apart);
                for (int64_t p = 0; p < POINTS; p++)
                    NAME(panel)(
                        input + p * APART(count * C) + c, C, 1, panel + p * apart, wide, product + p * APART(count * wide), wide, some,
                        count, wide, c > 0);
            }
            NAME(give_output)(s, product, first, count, k, wide, bias, out);
        }
    }
}

/* The gradient of a weight. scratch: max(channels, outputs) + 36 * (APART(block * channels) + APART(block * outputs)) numbers, and
 * 36 * channels * outputs more where there are several blocks, else 36 * GROUP * WIDTH. */
void NAME(shoal_winograd_backward)(const Shape *s, const T *x, const T *gradient, const Strides *by, T *out, T *scratch) {
    const int64_t tiles = s->images * ((s->height + 3) / 4) * ((s->width + 3) / 4), C = s->channels, K = s->outputs;
    const int64_t empty = C > K ? C : K;
    T *input = scratch + empty, *given = input + POINTS * APART(s->block * C), *sums = given + POINTS * APART(s->block * K);
    memset(scratch, 0, empty * sizeof(T));
    for (int64_t first = 0; first < tiles; first += s->block) {
        const int64_t count = tiles - first < s->block ? tiles - first : s->block;
        const int several = tiles > s->block, last = first + count == tiles;
        NAME(take_input)(s, x, first, count, scratch, input);
        NAME(take_gradient)(s, gradient, first, count, scratch, given);
        for (int64_t k = 0; k < K; k += WIDTH)
            for (int64_t c = 0; c < C; c += GROUP) {
                const int64_t wide = K - k < WIDTH ? K - k : WIDTH, some = C - c < GROUP ? C - c : GROUP;
                T *sum = several ? sums + POINTS * (k * C + c * wide) : sums;
                for (int64_t p = 0; p < POINTS; p++)
                    NAME(panel)(
                        input + p * APART(count * C) + c, 1, C, given + p * APART(count * K) + k, K, sum + p * some * wide, wide, count, some, wide,
                        first > 0);
                if (last) NAME(give_weight)(sum, some, wide, by, out + k * by->output + c * by->channel);
            }
    }
}
#undef WIDTH
#undef AT
#undef OF
#undef ROOT
#undef CASE
#undef CASES
#endif
