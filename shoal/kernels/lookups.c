/* Rows of embedding tables by their numbers, of several tables at once. Included once for float, once for double.
 *
 * What such a lookup takes is waiting for memory: a row lies wherever its number says. So the rows some numbers on are asked for
 * before the present one is copied, and a number is read once for all tables.
 */
#ifndef T
#include <string.h>

#define SELF "lookups.c"
#include "vectors.h"

/* So many numbers ahead are asked for. */
enum { AHEAD = 16 };

#include "twice.h"
#else
#include "vectors.h"

INLINE void NAME(copy)(T *to, const T *from, const int64_t width) {
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) *(V *)(to + j) = *(const V *)(from + j);
    for (; j < width; j++) to[j] = from[j];
}

INLINE T NAME(total)(const T *row, const int64_t width) {
    T sum = 0;
    for (int64_t j = 0; j < width; j++) sum += row[j];
    return sum;
}

/* ids: (samples, fields) numbers of rows. Of each table either its rows, one after the other, or for each sample the sum of all numbers
 * in its rows. wrong: becomes 1 where a number is of no row of one of the tables, and then nothing else is complete. */
void NAME(shoal_lookups_gather)(
    const int64_t tables, const T *const *weights, const int64_t *widths, const int64_t *counts, const int64_t *summed, T *const *outs,
    const int64_t *ids, const int64_t samples, const int64_t fields, int64_t *wrong) {
    const int64_t all = samples * fields;
    int64_t least = counts[0];
    for (int64_t t = 1; t < tables; t++) least = counts[t] < least ? counts[t] : least;
    for (int64_t i = 0; i < all; i++)
        if (ids[i] < 0 || ids[i] >= least) {
            *wrong = 1;
            return;
        }
    for (int64_t s = 0; s < samples; s++) {
        for (int64_t t = 0; t < tables; t++)
            if (summed[t]) outs[t][s] = 0;
        for (int64_t i = s * fields; i < (s + 1) * fields; i++)
            for (int64_t t = 0; t < tables; t++) {
                const int64_t width = widths[t];
                if (i + AHEAD < all) __builtin_prefetch(weights[t] + ids[i + AHEAD] * width);
                const T *row = weights[t] + ids[i] * width;
                if (summed[t])
                    outs[t][s] += NAME(total)(row, width);
                else
                    NAME(copy)(outs[t] + i * width, row, width);
            }
    }
}
#endif
