/* What the C files of a row table share: the layout of its memory, and what is done with the numbers of a row. See table.py. */
#ifndef SHOAL_ROWS_H
#define SHOAL_ROWS_H
#include <pthread.h>
#include <stdint.h>

typedef int64_t i64;
typedef uint64_t u64;
typedef uint32_t u32;

/* A table as a process sees it; the same fields as ``kernel.Layout``. */
struct table {
    char *base;       /* where this process has mapped the memory */
    i64 fd;           /* of the memory: pages are reserved before they are written to */
    i64 bits;         /* log2 of the number of shards */
    i64 width, state; /* numbers in a row: weights, then what the optimizer keeps */
    i64 itemsize;     /* 4: float, 8: double */
    i64 row_bytes;    /* with the head */
    i64 optimizer, initialiser, admit, max_age;
    i64 capacity;     /* most rows of a shard */
    u64 seed;
    double init[2];
    double p[8];      /* of the optimizer */
};

/* One shard lies in a span of its own: see ``memory.py`` for the same numbers. */
enum { SPAN_BITS = 34, HEAD_BYTES = 1 << 24, LEDGER_BITS = 1 << 16, SKETCH_BITS = 22, FILTER_BITS = 24, LEAST_LEVEL = 8, MOST_LEVEL = 25 };
#define LEDGER_AT ((i64)4096)
#define FILTER_AT ((i64)1 << 21)
#define CHANGES_AT ((i64)1 << 23)
#define FREE_AT ((i64)1 << 26)
#define INDEX_AT ((i64)1 << 29)
#define UNDO_AT ((i64)1 << 30)
#define ROWS_AT ((i64)1 << 31)

enum { IDLE = 0, APPLYING = 1, COMMITTED = 2, REBUILDING = 3 };

struct shard {
    pthread_mutex_t lock;
    char pad[64 - sizeof(pthread_mutex_t) % 64];
    u64 phase, pending, undo, structure;
    u64 level, rows_used, rows_reserved, undo_reserved, index_reserved, free_count, live;
    u64 ledger_base, ledger_next, pending_next;
    u64 spilled, pushes, repairs;
    u64 heard, changes; /* the size of the ring of changed keys, a power of two (0: nobody listens), and how many were written to it */
};

/* Before every row. ``version`` is odd while the row is being written. */
struct head {
    i64 key;
    u32 version, live, count, pad;
    i64 last;
};

static inline u64 shoal_mix(u64 x) {
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9ull;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
/* Where a key belongs: the first bits say in which shard. */
static inline u64 shoal_hash(i64 key) { return shoal_mix((u64)key + 0x9e3779b97f4a7c15ull); }

void shoal_rows_init(const struct table *t, i64 key, void *row);
void shoal_rows_update(const struct table *t, void *row, const void *gradient, double scale, i64 step);
#endif
