/* A batch of keys: each once, sorted by shard, and the gradients of several workers added up by key. */
#include <stdlib.h>
#include <string.h>

#include "rows.h"

/* Kept between calls: fresh memory would have to be cleared by the kernel each time. */
static __thread struct {
    u32 *slots;
    i64 size;
} scratch;

static u32 *slots_for(i64 n, u64 *mask) {
    i64 size = 1024;
    while (size < 2 * n) size *= 2;
    if (size > scratch.size) {
        free(scratch.slots);
        scratch.slots = malloc((size_t)size * sizeof(u32));
        scratch.size = scratch.slots ? size : 0;
        if (!scratch.slots) return 0;
    }
    memset(scratch.slots, 0, (size_t)size * sizeof(u32));
    *mask = (u64)size - 1;
    return scratch.slots;
}

/* Where a key stands in unique, which it is added to when it is new. */
static inline i64 place(u32 *slots, u64 mask, i64 key, i64 *unique, i64 *count) {
    u64 at = shoal_hash(key) & mask;
    for (; slots[at]; at = (at + 1) & mask)
        if (unique[slots[at] - 1] == key) return slots[at] - 1;
    unique[*count] = key;
    slots[at] = (u32)++*count;
    return *count - 1;
}

/* Each key once, in the order of first appearance: unique, how often (counts), and where each of the n is (inverse). A key that is
 * ``skipped`` (where skips is set) has the position -1. Returns how many there are, -1 without memory. */
i64 shoal_rows_unique(const i64 *keys, i64 n, i64 *unique, int32_t *inverse, u32 *counts, i64 skips, i64 skipped) {
    u64 mask;
    u32 *slots = slots_for(n, &mask);
    i64 count = 0;
    if (!slots) return -1;
    for (i64 i = 0; i < n; i++) {
        if (i + 16 < n) __builtin_prefetch(slots + (shoal_hash(keys[i + 16]) & mask));
        if (skips && keys[i] == skipped) {
            inverse[i] = -1;
            continue;
        }
        i64 before = count, at = place(slots, mask, keys[i], unique, &count);
        counts[at] = before == count ? counts[at] + 1 : 1;
        inverse[i] = (int32_t)at;
    }
    return count;
}

/* Sort n different keys by shard: order holds their positions, shard s has those from starts[s] to starts[s + 1]. */
void shoal_rows_partition(const i64 *keys, i64 n, i64 bits, u32 *order, i64 *starts) {
    i64 shards = (i64)1 << bits, at[65];
    memset(starts, 0, (size_t)(shards + 1) * sizeof(i64));
    for (i64 i = 0; i < n; i++) starts[1 + (bits ? (i64)(shoal_hash(keys[i]) >> (64 - bits)) : 0)]++;
    for (i64 s = 0; s < shards; s++) starts[s + 1] += starts[s];
    memcpy(at, starts, (size_t)shards * sizeof(i64));
    for (i64 i = 0; i < n; i++) order[at[bits ? (i64)(shoal_hash(keys[i]) >> (64 - bits)) : 0]++] = (u32)i;
}

/* What a worker has to say of a step: keys sorted by shard, how often each, and its gradient. */
struct part {
    const i64 *keys;
    const u32 *counts;
    const char *rows;
    const i64 *starts;
};

/* Add up the parts by key, part after part, for the shards from first to last. Returns how many keys there are, -1 without memory. */
#define DEFINE_MERGE(NAME, T)                                                                                                  \
    i64 NAME(const struct part *parts, i64 k, i64 first, i64 last, i64 width, i64 *keys, u32 *counts, T *sums, i64 *starts) { \
        i64 total = 0;                                                                                                         \
        for (i64 s = first; s < last; s++) {                                                                                   \
            i64 n = 0, count = 0;                                                                                              \
            u64 mask;                                                                                                          \
            for (i64 p = 0; p < k; p++) n += parts[p].starts[s + 1] - parts[p].starts[s];                                      \
            u32 *slots = slots_for(n, &mask);                                                                                  \
            if (!slots) return -1;                                                                                             \
            starts[s - first] = total;                                                                                         \
            for (i64 p = 0; p < k; p++)                                                                                        \
                for (i64 i = parts[p].starts[s]; i < parts[p].starts[s + 1]; i++) {                                            \
                    const T *g = (const T *)parts[p].rows + i * width;                                                         \
                    i64 before = count, at = total + place(slots, mask, parts[p].keys[i], keys + total, &count);               \
                    T *o = sums + at * width;                                                                                  \
                    if (before == count) {                                                                                     \
                        counts[at] += parts[p].counts[i];                                                                      \
                        for (i64 j = 0; j < width; j++) o[j] += g[j];                                                          \
                    } else {                                                                                                   \
                        counts[at] = parts[p].counts[i];                                                                       \
                        memcpy(o, g, (size_t)width * sizeof(T));                                                               \
                    }                                                                                                          \
                }                                                                                                              \
            total += count;                                                                                                    \
        }                                                                                                                      \
        starts[last - first] = total;                                                                                          \
        return total;                                                                                                          \
    }
DEFINE_MERGE(shoal_rows_merge_f32, float)
DEFINE_MERGE(shoal_rows_merge_f64, double)
