/* Convolution, bias, ReLU and max-pooling of small images in one pass, and its backward pass. Included once for float, once for double.
 *
 * Vectors run over output channels; a pooling window's positions are computed together, so what the convolution gives never leaves the
 * registers: only each window's maximum is written, and one byte that says where it was (NONE: ReLU let nothing through).
 * The portable vector types of GCC and clang become AVX-512, AVX2, NEON or plain code, whatever the machine has.
 */
#ifndef T
#include <string.h>

#define SELF "conv_pool.c"
#include "vectors.h"

enum { NONE = 255, MOST_WINDOW = 4 };

/* Sizes in elements; the strides are the input's. Everything else is contiguous: outputs are (images, rows, columns, channels). */
typedef struct {
    int64_t images, channels, kernel_height, kernel_width, outputs, rows, columns, window, relu;
    int64_t image_stride, channel_stride, row_stride, column_stride;
} Shape;

int shoal_conv_pool_lanes(int itemsize) { return VECTOR_BYTES / itemsize; }

#include "twice.h"
#else
#include "vectors.h"

typedef uint8_t NAME(B) __attribute__((vector_size(VECTOR_BYTES / sizeof(T)), aligned(1)));
#define B NAME(B)

static inline V NAME(splat)(T x) { return x - (V){}; }

/* a where the mask's bits are set, else b. */
static inline V NAME(blend)(I mask, V a, V b) { return (V)((mask & (I)a) | (~mask & (I)b)); }

/* One window in each of `cells` neighbouring places, for `blocks` vectors of channels. weight: (taps, outputs). */
INLINE void NAME(forward_window)(
    const T *x, const int64_t *offsets, int64_t taps, const T *weight, const T *bias, const Shape *s, T *out, uint8_t *where,
    const int cells, const int blocks, const int window) {
    V sum[2][MOST_WINDOW][2];
    for (int c = 0; c < cells; c++)
        for (int p = 0; p < window * window; p++)
            for (int b = 0; b < blocks; b++) sum[c][p][b] = *(const V *)(bias + b * LANES);
    const int64_t next = window * s->column_stride;
    for (int64_t k = 0; k < taps; k++) {
        const T *at = x + offsets[k];
        V w[2];
        for (int b = 0; b < blocks; b++) w[b] = *(const V *)(weight + k * s->outputs + b * LANES);
        for (int c = 0; c < cells; c++)
            for (int p = 0; p < window * window; p++) {
                V value = NAME(splat)(at[c * next + (p / window) * s->row_stride + (p % window) * s->column_stride]);
                for (int b = 0; b < blocks; b++) sum[c][p][b] += w[b] * value;
            }
    }
    for (int c = 0; c < cells; c++)
        for (int b = 0; b < blocks; b++) {
            V best = sum[c][0][b];
            I place = {};
            for (int p = 1; p < window * window; p++) {
                V value = sum[c][p][b];
                /* The first of equals, and a NaN before all, as torch has it. */
                I later = (I)(value > best) | (I)(value != value);
                best = NAME(blend)(later, value, best);
                place = (later & (p - (I){})) | (~later & place);
            }
            if (s->relu) {
                I shut = (I)(best <= (T)0 - (V){});
                best = NAME(blend)(shut, (V){}, best);
                place = (shut & (NONE - (I){})) | (~shut & place);
            }
            *(V *)(out + c * s->outputs + b * LANES) = best;
            *(B *)(where + c * s->outputs + b * LANES) = __builtin_convertvector(place, B);
        }
}

#define FORWARD(CELLS, BLOCKS, WINDOW) \
    NAME(forward_window)(at, offsets, taps, weight + o, bias + o, s, out + o, where + o, CELLS, BLOCKS, WINDOW)

INLINE void NAME(forward_images)(
    const Shape *s, const int64_t *offsets, const T *x, const T *weight, const T *bias, T *out, uint8_t *where, const int window) {
    const int64_t taps = s->channels * s->kernel_height * s->kernel_width;
    for (int64_t n = 0; n < s->images; n++)
        for (int64_t row = 0; row < s->rows; row++)
            for (int64_t column = 0; column < s->columns;) {
                const T *at = x + n * s->image_stride + row * window * s->row_stride + column * window * s->column_stride;
                const int pair = VECTOR_BYTES == 64 && column + 1 < s->columns;
                int64_t o = 0;
                for (; o + 2 * LANES <= s->outputs; o += 2 * LANES) {
                    if (pair) FORWARD(2, 2, window);
                    else FORWARD(1, 2, window);
                }
                for (; o < s->outputs; o += LANES) {
                    if (pair) FORWARD(2, 1, window);
                    else FORWARD(1, 1, window);
                }
                column += 1 + pair;
                out += (1 + pair) * s->outputs;
                where += (1 + pair) * s->outputs;
            }
}

/* outputs must be whole vectors; offsets: of each tap from its window position's first element. */
void NAME(shoal_conv_pool_forward)(
    const Shape *s, const int64_t *offsets, const T *x, const T *weight, const T *bias, T *out, uint8_t *where) {
    if (s->window == 2) NAME(forward_images)(s, offsets, x, weight, bias, out, where, 2);
    else NAME(forward_images)(s, offsets, x, weight, bias, out, where, 1);
}

/* What one image adds to the gradients of `taps` taps (at most 9) and `blocks` vectors of channels. */
INLINE void NAME(backward_image)(
    const Shape *s, const int64_t *offsets, const T *x, const T *gradient, const uint8_t *where, T *weight, T *bias,
    const int taps, const int blocks, const int window) {
    V sum[9][2] = {}, total[2] = {};
    for (int64_t row = 0; row < s->rows; row++)
        for (int64_t column = 0; column < s->columns; column++) {
            const int64_t cell = (row * s->columns + column) * s->outputs;
            const T *first = x + row * window * s->row_stride + column * window * s->column_stride;
            V given[2];
            I place[2];
            for (int b = 0; b < blocks; b++) {
                given[b] = *(const V *)(gradient + cell + b * LANES);
                place[b] = __builtin_convertvector(*(const B *)(where + cell + b * LANES), I);
                if (bias) total[b] += NAME(blend)(place[b] != NONE, given[b], (V){});
            }
            for (int p = 0; p < window * window; p++) {
                const T *at = first + (p / window) * s->row_stride + (p % window) * s->column_stride;
                V own[2];
                for (int b = 0; b < blocks; b++) own[b] = NAME(blend)(place[b] == p, given[b], (V){});
                for (int k = 0; k < taps; k++) {
                    V value = NAME(splat)(at[offsets[k]]);
                    for (int b = 0; b < blocks; b++) sum[k][b] += own[b] * value;
                }
            }
        }
    for (int b = 0; b < blocks; b++) {
        if (bias) *(V *)(bias + b * LANES) += total[b];
        for (int k = 0; k < taps; k++) *(V *)(weight + k * s->outputs + b * LANES) += sum[k][b];
    }
}

#define BACKWARD(TAPS, BLOCKS, WINDOW) \
    NAME(backward_image)(s, offsets + k, image, given + o, places + o, weight + k * s->outputs + o, k ? 0 : bias + o, TAPS, BLOCKS, WINDOW)

INLINE void NAME(backward_images)(
    const Shape *s, const int64_t *offsets, const T *x, const T *gradient, const uint8_t *where, T *weight, T *bias, const int window) {
    const int64_t taps = s->channels * s->kernel_height * s->kernel_width, size = s->rows * s->columns * s->outputs;
    for (int64_t n = 0; n < s->images; n++) {
        const T *image = x + n * s->image_stride, *given = gradient + n * size;
        const uint8_t *places = where + n * size;
        for (int64_t k = 0; k < taps;) {
            const int nine = k + 9 <= taps;
            int64_t o = 0;
            /* Nine taps and two vectors of channels keep 18 sums in registers where there are 32 of them. */
            for (; VECTOR_BYTES == 64 && o + 2 * LANES <= s->outputs; o += 2 * LANES) {
                if (nine) BACKWARD(9, 2, window);
                else BACKWARD(1, 2, window);
            }
            for (; o < s->outputs; o += LANES) {
                if (nine) BACKWARD(9, 1, window);
                else BACKWARD(1, 1, window);
            }
            k += nine ? 9 : 1;
        }
    }
}

/* Adds to weight (taps, outputs) and bias (outputs). */
void NAME(shoal_conv_pool_backward)(
    const Shape *s, const int64_t *offsets, const T *x, const T *gradient, const uint8_t *where, T *weight, T *bias) {
    if (s->window == 2) NAME(backward_images)(s, offsets, x, gradient, where, weight, bias, 2);
    else NAME(backward_images)(s, offsets, x, gradient, where, weight, bias, 1);
}

/* The gradient of what the convolution gave, (images, rows * window, columns * window, outputs), from that of the maxima. */
void NAME(shoal_conv_pool_unpool)(const Shape *s, const T *gradient, const uint8_t *where, T *out) {
    const int64_t window = s->window, wide = s->columns * window;
    for (int64_t n = 0; n < s->images; n++)
        for (int64_t row = 0; row < s->rows; row++)
            for (int64_t column = 0; column < s->columns; column++, gradient += s->outputs, where += s->outputs)
                for (int64_t p = 0; p < window * window; p++) {
                    T *at = out + (((n * s->rows + row) * window + p / window) * wide + column * window + p % window) * s->outputs;
                    for (int64_t o = 0; o < s->outputs; o++) at[o] = where[o] == p ? gradient[o] : (T)0;
                }
}
#undef B
#undef FORWARD
#undef BACKWARD
#endif
