/* BatchNorm in training, with the addition and the ReLU behind it, over rows of channels (pictures in channels_last). Included once for
 * float, once for double.
 *
 * Each function passes once over its tensors. Sums are taken over a few rows in registers and then added up in double, so that they
 * are exact to single precision whatever the size of the batch. Channels must be whole vectors.
 */
#ifndef T
#define SELF "batchnorm.c"
#include "vectors.h"

/* Rows whose sums stay in registers, and vectors of channels that are summed together. */
enum { FEW = 32, WIDE = 4 };

int shoal_batchnorm_lanes(int itemsize) { return VECTOR_BYTES / itemsize; }

#include "twice.h"
#else
#include "vectors.h"

#define AT(p) (*(V *)(p))
#define OF(p) (*(const V *)(p))

INLINE void NAME(add)(double *total, const V *sum, const int blocks) {
    for (int b = 0; b < blocks; b++)
        for (int k = 0; k < LANES; k++) total[b * LANES + k] += sum[b][k];
}

/* What lets a gradient through a ReLU with this output; a NaN does, as in torch. */
INLINE V NAME(let)(V gradient, V output) { return (V)((I)gradient & ~(I)(output <= (V){})); }

INLINE void NAME(moments_of)(
    const T *x, const T *first, int64_t rows, int64_t channels, double *sum, double *squares, const int blocks) {
    V s[WIDE] = {}, q[WIDE] = {};
    for (int64_t r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++) {
            const V value = OF(x + r * channels + b * LANES) - OF(first + b * LANES);
            s[b] += value;
            q[b] += value * value;
        }
    NAME(add)(sum, s, blocks);
    NAME(add)(squares, q, blocks);
}

/* Adds to the sums of x - first and of its squares; `first` is one value of each channel, so that little is lost in squares. */
void NAME(shoal_batchnorm_moments)(const T *x, const T *first, int64_t rows, int64_t channels, double *sum, double *squares) {
    for (int64_t r = 0; r < rows; r += FEW) {
        const int64_t some = rows - r < FEW ? rows - r : FEW;
        int64_t c = 0;
        for (; c + WIDE * LANES <= channels; c += WIDE * LANES)
            NAME(moments_of)(x + r * channels + c, first + c, some, channels, sum + c, squares + c, WIDE);
        for (; c < channels; c += LANES)
            NAME(moments_of)(x + r * channels + c, first + c, some, channels, sum + c, squares + c, 1);
    }
}

/* y = x * scale + shift, and `more` where it is given, and ReLU where it is asked for. */
void NAME(shoal_batchnorm_normalize)(
    const T *x, const T *scale, const T *shift, const T *more, int relu, int64_t rows, int64_t channels, T *y) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < channels; c += LANES) {
            const int64_t at = r * channels + c;
            V value = OF(x + at) * OF(scale + c) + OF(shift + c);
            if (more) value += OF(more + at);
            if (relu) value = (V)((I)value & ~(I)(value < (V){}));
            AT(y + at) = value;
        }
}

INLINE void NAME(sums_of)(
    const T *x, const T *gradient, const T *output, const T *mean, int64_t rows, int64_t channels, T *let, double *sum, double *products,
    const int blocks) {
    V s[WIDE] = {}, p[WIDE] = {};
    for (int64_t r = 0; r < rows; r++)
        for (int b = 0; b < blocks; b++) {
            const int64_t at = r * channels + b * LANES;
            V value = OF(gradient + at);
            if (output) value = NAME(let)(value, OF(output + at));
            if (let) AT(let + at) = value;
            s[b] += value;
            p[b] += value * (OF(x + at) - OF(mean + b * LANES));
        }
    NAME(add)(sum, s, blocks);
    NAME(add)(products, p, blocks);
}

/* Adds to the sums of the gradient and of its products with x - mean. `output`, where it is given, is the ReLU's: what it stops is
 * left out; `let`, where it is given, gets what it lets through. */
void NAME(shoal_batchnorm_sums)(
    const T *x, const T *gradient, const T *output, const T *mean, int64_t rows, int64_t channels, T *let, double *sum, double *products) {
    for (int64_t r = 0; r < rows; r += FEW) {
        const int64_t some = rows - r < FEW ? rows - r : FEW;
        for (int64_t c = 0; c < channels;) {
            const int64_t at = r * channels + c, wide = c + WIDE * LANES <= channels ? WIDE : 1;
            const T *out = output ? output + at : 0;
            T *to = let ? let + at : 0;
            if (wide == WIDE) NAME(sums_of)(x + at, gradient + at, out, mean + c, some, channels, to, sum + c, products + c, WIDE);
            else NAME(sums_of)(x + at, gradient + at, out, mean + c, some, channels, to, sum + c, products + c, 1);
            c += wide * LANES;
        }
    }
}

/* The gradient of x: gradient * factor + (x - mean) * slope + shift, of what `output` lets through. */
void NAME(shoal_batchnorm_gradient)(
    const T *x, const T *gradient, const T *output, const T *mean, const T *factor, const T *slope, const T *shift, int64_t rows,
    int64_t channels, T *out) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < channels; c += LANES) {
            const int64_t at = r * channels + c;
            V value = OF(gradient + at);
            if (output) value = NAME(let)(value, OF(output + at));
            AT(out + at) = value * OF(factor + c) + (OF(x + at) - OF(mean + c)) * OF(slope + c) + OF(shift + c);
        }
}
#undef AT
#undef OF
#endif
