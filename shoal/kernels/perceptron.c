/* A chain of small linear layers, each with or without a ReLU behind it, and its gradients. Included once for float, once for double.
 *
 * Rows go through the whole chain a block at a time, so what a layer gives is still in the nearest cache when the next one takes it, and
 * nothing is called between layers. All three products (forward, for the input, for the weights) are the one in `multiply`: vectors
 * run over columns, and widths are padded to whole vectors. The portable vector types of GCC and clang become AVX-512, AVX2, NEON or
 * plain code.
 */
#ifndef T
#include <string.h>

#define SELF "perceptron.c"
#include "vectors.h"

/* Sums of ROWS by PANEL vectors stay in registers: 24 of 32, or 12 of 16. */
enum { ROWS = 6, BLOCK = 48 };

int shoal_perceptron_lanes(int itemsize) { return VECTOR_BYTES / itemsize; }

#include "twice.h"
#else
#include "vectors.h"

#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)

/* `rows` by `vectors` of c = a b, or c + a b; `row` and `step` are between a's rows and columns, `width` between b's rows and c's. */
INLINE void NAME(tile)(
    const T *a, const int64_t row, const int64_t step, const T *b, T *c, const int64_t width, const int64_t depth, const int add,
    const int rows, const int vectors) {
    V sum[ROWS][PANEL];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = add ? *(const V *)(c + i * width + j * LANES) : (V){};
    for (int64_t k = 0; k < depth; k++) {
        V own[PANEL];
        for (int j = 0; j < vectors; j++) own[j] = *(const V *)(b + k * width + j * LANES);
        for (int i = 0; i < rows; i++) {
            const T value = a[i * row + k * step];
            for (int j = 0; j < vectors; j++) sum[i][j] += own[j] * value;
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) *(V *)(c + i * width + j * LANES) = sum[i][j];
}

INLINE void NAME(column)(
    const T *a, const int64_t row, const int64_t step, const T *b, T *c, const int64_t width, const int64_t rows, const int64_t depth,
    const int add, const int vectors) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS) NAME(tile)(a + i * row, row, step, b, c + i * width, width, depth, add, ROWS, vectors);
    for (; i + 2 <= rows; i += 2) NAME(tile)(a + i * row, row, step, b, c + i * width, width, depth, add, 2, vectors);
    for (; i < rows; i++) NAME(tile)(a + i * row, row, step, b, c + i * width, width, depth, add, 1, vectors);
}

/* c (rows, width) = a (rows, depth) b (depth, width), or c + a b. */
static void NAME(multiply)(
    const T *a, const int64_t row, const int64_t step, const T *b, T *c, const int64_t width, const int64_t rows, const int64_t depth,
    const int add) {
    int64_t j = 0;
    for (; j + PANEL * LANES <= width; j += PANEL * LANES) NAME(column)(a, row, step, b + j, c + j, width, rows, depth, add, PANEL);
    for (; j + 2 * LANES <= width; j += 2 * LANES) NAME(column)(a, row, step, b + j, c + j, width, rows, depth, add, 2);
    for (; j < width; j += LANES) NAME(column)(a, row, step, b + j, c + j, width, rows, depth, add, 1);
}

/* Rows between a tight matrix and one of padded width, whose other columns are zero. */
static void NAME(widen)(const T *tight, T *padded, const int64_t rows, const int64_t width) {
    const int64_t wide = PADDED(width);
    for (int64_t i = 0; i < rows; i++) {
        memcpy(padded + i * wide, tight + i * width, width * sizeof(T));
        for (int64_t j = width; j < wide; j++) padded[i * wide + j] = 0;
    }
}

static void NAME(narrow)(const T *padded, T *tight, const int64_t rows, const int64_t width) {
    const int64_t wide = PADDED(width);
    for (int64_t i = 0; i < rows; i++) memcpy(tight + i * width, padded + i * wide, width * sizeof(T));
}

/* y = relu(y + bias), or y + bias. */
static void NAME(finish)(T *y, const T *bias, const int64_t rows, const int64_t width, const int relu) {
    const int64_t wide = PADDED(width);
    for (int64_t i = 0; i < rows; i++) {
        T *own = y + i * wide;
        if (bias)
            for (int64_t j = 0; j < width; j++) own[j] += bias[j];
        if (relu)
            for (int64_t j = 0; j < wide; j++) own[j] = own[j] < 0 ? 0 : own[j];
    }
}

/* The rows from start to stop of all. sizes: layers + 1 of them; weights: a pointer for each layer, (outputs, inputs); biases: the same,
 * or 0 where there is none; relu: one for each. kept: of each layer but the last a matrix (all, padded outputs), one after the other.
 * room: for the transposed weights, and a block of the last layer. */
void NAME(shoal_perceptron_forward)(
    const T *x, const int64_t all, const int64_t start, const int64_t stop, const int64_t layers, const int64_t *sizes,
    const T *const *weights, const T *const *biases, const int64_t *relu, T *kept, T *y, T *room) {
    T *turned = room;
    for (int64_t l = 0; l < layers; l++) {
        const int64_t in = sizes[l], out = sizes[l + 1], wide = PADDED(out);
        for (int64_t k = 0; k < in; k++) {
            for (int64_t o = 0; o < out; o++) turned[k * wide + o] = weights[l][o * in + k];
            for (int64_t o = out; o < wide; o++) turned[k * wide + o] = 0;
        }
        turned += in * wide;
    }
    T *last = turned;
    for (int64_t at = start; at < stop; at += BLOCK) {
        const int64_t own = stop - at < BLOCK ? stop - at : BLOCK;
        const T *given = x + at * sizes[0];
        int64_t width = sizes[0];
        T *place = kept, *weight = room;
        for (int64_t l = 0; l < layers; l++) {
            const int64_t out = sizes[l + 1], wide = PADDED(out);
            T *to = l == layers - 1 ? last : place + at * wide;
            NAME(multiply)(given, width, 1, weight, to, wide, own, sizes[l], 0);
            NAME(finish)(to, biases[l], own, out, relu[l] != 0);
            weight += sizes[l] * wide;
            place += all * wide;
            given = to;
            width = wide;
        }
        NAME(narrow)(last, y + at * sizes[layers], own, sizes[layers]);
    }
}

/* What the rows from start to stop add to the gradients of weights and biases, and the gradient of x; 0 where it is not wanted.
 * room: for two padded copies of the weights, and for three blocks of the widest layer. */
void NAME(shoal_perceptron_backward)(
    const T *x, const int64_t all, const int64_t start, const int64_t stop, const int64_t layers, const int64_t *sizes,
    const T *const *weights, T *const *for_weights, T *const *for_biases, const int64_t *relu, const T *kept, const T *y,
    const T *gradient, T *for_x, T *room) {
    int64_t widest = 0, offset = 0, own_weights = 0;
    for (int64_t l = 0; l <= layers; l++) widest = PADDED(sizes[l]) > widest ? PADDED(sizes[l]) : widest;
    for (int64_t l = 0; l < layers; l++) own_weights += sizes[l + 1] * PADDED(sizes[l]);
    T *sums = room, *padded = sums + own_weights, *first = padded + own_weights, *second = first + BLOCK * widest;
    T *input = second + BLOCK * widest;
    memset(sums, 0, own_weights * sizeof(T));
    for (int64_t l = 0; l < layers; l++) {
        NAME(widen)(weights[l], padded + offset, sizes[l + 1], sizes[l]);
        offset += sizes[l + 1] * PADDED(sizes[l]);
        if (for_biases[l]) memset(for_biases[l], 0, sizes[l + 1] * sizeof(T));
    }
    int64_t end = 0;
    for (int64_t l = 1; l < layers; l++) end += PADDED(sizes[l]);
    for (int64_t at = start; at < stop; at += BLOCK) {
        const int64_t own = stop - at < BLOCK ? stop - at : BLOCK;
        NAME(widen)(gradient + at * sizes[layers], first, own, sizes[layers]);
        if (relu[layers - 1])
            for (int64_t i = 0; i < own; i++)
                for (int64_t j = 0; j < sizes[layers]; j++)
                    if (y[(at + i) * sizes[layers] + j] <= 0) first[i * PADDED(sizes[layers]) + j] = 0;
        T *here = first, *below = second;
        int64_t place = end * all, from = own_weights;
        for (int64_t l = layers - 1; l >= 0; l--) {
            const int64_t in = sizes[l], out = sizes[l + 1], wide = PADDED(in), step = PADDED(out);
            const T *given;
            from -= out * wide;
            if (l) {
                place -= all * wide;
                given = kept + place + at * wide;
            } else if (in == wide) {
                given = x + at * in;
            } else {
                NAME(widen)(x + at * in, input, own, in);
                given = input;
            }
            if (for_biases[l])
                for (int64_t i = 0; i < own; i++)
                    for (int64_t j = 0; j < out; j++) for_biases[l][j] += here[i * step + j];
            if (for_weights[l]) NAME(multiply)(here, 1, step, given, sums + from, wide, out, own, 1);
            if (!l && !for_x) break;
            T *to = !l && in == wide ? for_x + at * in : below;
            NAME(multiply)(here, step, 1, padded + from, to, wide, own, out, 0);
            if (l && relu[l - 1])
                for (int64_t i = 0; i < own * wide; i++) to[i] = given[i] <= 0 ? 0 : to[i];
            if (!l && in != wide) NAME(narrow)(to, for_x + at * in, own, in);
            below = here;
            here = to;
        }
    }
    offset = 0;
    for (int64_t l = 0; l < layers; l++) {
        if (for_weights[l]) NAME(narrow)(sums + offset, for_weights[l], sizes[l + 1], sizes[l]);
        offset += sizes[l + 1] * PADDED(sizes[l]);
    }
}

#undef PADDED
#endif
