/* The numbers of rows: their first values, what optimizers make of a gradient, sums and copies by position. */
#include <math.h>
#include <string.h>

#include "rows.h"

enum { ZEROS = 0, CONSTANT = 1, UNIFORM = 2, NORMAL = 3 };
enum { SGD = 0, ADAGRAD = 1, ROWWISE_ADAGRAD = 2, ADAM = 3, FTRL = 4 };

/* A number that depends on nothing but (seed, key, position): integers until the last step, so that it has the same bits anywhere.
 * NORMAL is the sum of 12 uniform numbers of 16 bits (Irwin-Hall): mean 0, deviation 1, never beyond 6. */
static inline double first_value(const struct table *t, u64 stream, i64 at) {
    if (t->initialiser == ZEROS) return 0.0;
    if (t->initialiser == CONSTANT) return t->init[0];
    if (t->initialiser == UNIFORM) {
        double u = (double)(i64)(shoal_mix(stream + (u64)at * 0x9e3779b97f4a7c15ull) >> 11) * 0x1p-53;
        return t->init[0] + (t->init[1] - t->init[0]) * u;
    }
    i64 sum = 0;
    for (int k = 0; k < 3; k++) {
        u64 r = shoal_mix(stream + (u64)(3 * at + k) * 0x9e3779b97f4a7c15ull);
        sum += (i64)(r & 0xffff) + (i64)(r >> 16 & 0xffff) + (i64)(r >> 32 & 0xffff) + (i64)(r >> 48);
    }
    return t->init[0] + t->init[1] * ((double)(sum - 6 * 65535) * 0x1p-16);
}

#define DEFINE_ROW(T, SUFFIX, SQRT, FABS)                                                                              \
    static void init_##SUFFIX(const struct table *t, i64 key, T *row) {                                                \
        u64 stream = shoal_mix(t->seed ^ shoal_hash(key));                                                             \
        for (i64 j = 0; j < t->width; j++) row[j] = (T)first_value(t, stream, j);                                      \
        T rest = t->optimizer == ADAGRAD || t->optimizer == ROWWISE_ADAGRAD ? (T)t->p[2] : 0;                          \
        for (i64 j = t->width; j < t->width + t->state; j++) row[j] = rest;                                            \
    }                                                                                                                  \
    static void update_##SUFFIX(const struct table *t, T *restrict w, const T *restrict gradient, T scale, i64 step) { \
        const i64 n = t->width;                                                                                        \
        const T lr = (T)t->p[0];                                                                                       \
        T *restrict s = w + n;                                                                                         \
        switch (t->optimizer) {                                                                                        \
        case SGD:                                                                                                      \
            if (t->state) {                                                                                            \
                const T momentum = (T)t->p[1];                                                                         \
                for (i64 j = 0; j < n; j++) s[j] = momentum * s[j] + gradient[j] * scale, w[j] -= lr * s[j];           \
            } else                                                                                                     \
                for (i64 j = 0; j < n; j++) w[j] -= lr * (gradient[j] * scale);                                        \
            break;                                                                                                     \
        case ADAGRAD: {                                                                                                \
            const T eps = (T)t->p[1];                                                                                  \
            for (i64 j = 0; j < n; j++) {                                                                              \
                T g = gradient[j] * scale;                                                                             \
                s[j] += g * g;                                                                                         \
                w[j] -= lr * g / (SQRT(s[j]) + eps);                                                                   \
            }                                                                                                          \
            break;                                                                                                     \
        }                                                                                                              \
        case ROWWISE_ADAGRAD: {                                                                                        \
            double sum = 0;                                                                                            \
            for (i64 j = 0; j < n; j++) sum += (double)(gradient[j] * scale) * (double)(gradient[j] * scale);          \
            s[0] += (T)(sum / (double)n);                                                                              \
            const T by = lr / (SQRT(s[0]) + (T)t->p[1]);                                                               \
            for (i64 j = 0; j < n; j++) w[j] -= by * (gradient[j] * scale);                                            \
            break;                                                                                                     \
        }                                                                                                              \
        case ADAM: {                                                                                                   \
            const T b1 = (T)t->p[1], b2 = (T)t->p[2], eps = (T)t->p[3];                                                \
            const double k = (double)step + 1;                                                                         \
            const T by = (T)(t->p[0] * sqrt(1 - pow(t->p[2], k)) / (1 - pow(t->p[1], k)));                             \
            T *restrict v = s + n;                                                                                     \
            for (i64 j = 0; j < n; j++) {                                                                              \
                T g = gradient[j] * scale;                                                                             \
                s[j] = s[j] + (g - s[j]) * (1 - b1);                                                                   \
                v[j] = v[j] + (g * g - v[j]) * (1 - b2);                                                               \
                w[j] -= by * s[j] / (SQRT(v[j]) + eps);                                                                \
            }                                                                                                          \
            break;                                                                                                     \
        }                                                                                                              \
        default: {                                                                                                     \
            /* FTRL-Proximal: McMahan et al. 2013, algorithm 1; s is z, v is n. */                                     \
            const T beta = (T)t->p[1], l1 = (T)t->p[2], l2 = (T)t->p[3];                                               \
            T *restrict v = s + n;                                                                                     \
            for (i64 j = 0; j < n; j++) {                                                                              \
                T g = gradient[j] * scale, root = SQRT(v[j] + g * g);                                                  \
                s[j] += g - (root - SQRT(v[j])) / lr * w[j];                                                           \
                v[j] += g * g;                                                                                         \
                w[j] = FABS(s[j]) <= l1 ? 0 : ((s[j] < 0 ? -l1 : l1) - s[j]) / ((beta + root) / lr + l2);              \
            }                                                                                                          \
        }                                                                                                              \
        }                                                                                                              \
    }                                                                                                                  \
    /* out[i] = the sum of rows[inverse[i * bag]] … rows[inverse[i * bag + bag - 1]]; a negative position is a row of zeros. */ \
    void shoal_rows_gather_##SUFFIX(T *restrict out, const T *restrict rows, const int32_t *inverse, i64 n, i64 bag, i64 width) { \
        for (i64 i = 0; i < n; i++) {                                                                                  \
            T *o = out + i * width;                                                                                    \
            const int32_t *at = inverse + i * bag;                                                                     \
            if (bag == 1) {                                                                                            \
                if (at[0] < 0) memset(o, 0, (size_t)width * sizeof(T));                                                \
                else memcpy(o, rows + (i64)at[0] * width, (size_t)width * sizeof(T));                                  \
                continue;                                                                                              \
            }                                                                                                          \
            for (i64 j = 0; j < width; j++) o[j] = 0;                                                                  \
            for (i64 k = 0; k < bag; k++)                                                                              \
                if (at[k] >= 0)                                                                                        \
                    for (i64 j = 0; j < width; j++) o[j] += rows[(i64)at[k] * width + j];                              \
        }                                                                                                              \
    }                                                                                                                  \
    /* The other way: sums[inverse[i * bag + k]] += gradients[i]; sums are zero when it begins. */                     \
    void shoal_rows_scatter_##SUFFIX(T *restrict sums, const T *restrict gradients, const int32_t *inverse, i64 n, i64 bag, i64 width) { \
        for (i64 i = 0; i < n; i++) {                                                                                  \
            const T *g = gradients + i * width;                                                                        \
            for (i64 k = 0; k < bag; k++) {                                                                            \
                i64 at = inverse[i * bag + k];                                                                         \
                if (at < 0) continue;                                                                                  \
                T *o = sums + at * width;                                                                              \
                for (i64 j = 0; j < width; j++) o[j] += g[j];                                                          \
            }                                                                                                          \
        }                                                                                                              \
    }
DEFINE_ROW(float, f32, sqrtf, fabsf)
DEFINE_ROW(double, f64, sqrt, fabs)

/* Write a key's first weights and the optimizer's first state. */
void shoal_rows_init(const struct table *t, i64 key, void *row) {
    if (t->itemsize == 4) init_f32(t, key, row);
    else init_f64(t, key, row);
}

/* Let the optimizer take a step; step counts from 0. */
void shoal_rows_update(const struct table *t, void *row, const void *gradient, double scale, i64 step) {
    if (t->itemsize == 4) update_f32(t, row, gradient, (float)scale, step);
    else update_f64(t, row, gradient, scale, step);
}
