/* A table of rows by 64-bit key in shared memory: finding, creating, updating, and mending after a killed process. See table.py.
 *
 * A shard is written by whoever holds its lock, a robust mutex: when its holder is killed, the next one gets it with EOWNERDEAD
 * and mends the shard. What a push changes is noted in the undo log first, so a push to a shard is there as a whole or not at all.
 * Readers take no lock: a row has a version that is odd while it is written, a shard's index another while it is rebuilt.
 * Only the order in which the compiler leaves stores matters for a killed process, hence the fences. */
#define _GNU_SOURCE
#include "rows.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { DONE = 0, DUPLICATE = 1, BUSY = -1, NO_MEMORY = -2, FULL = -3, STUCK = -4 };
enum { MADE = 1, CHANGED = 2, SEEN = 3 };
enum { BLOCK = 32, LINE = 64, MOST_TRIES = 1 << 16 };

#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#define STORE(x, v) __atomic_store_n(&(x), (v), __ATOMIC_RELEASE)
#define FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)

/* What the undo log says of one change; before it lies the row as it was, where it is CHANGED. */
struct note {
    u32 kind, at;
    u64 before;
};

static inline char *span(const struct table *t, i64 s) { return t->base + (s << SPAN_BITS) + HEAD_BYTES; }
static inline struct shard *shard_of(const struct table *t, i64 s) { return (struct shard *)span(t, s); }
static inline u64 *index_of(const struct table *t, i64 s, u64 level) { return (u64 *)(span(t, s) + INDEX_AT + ((i64)8 << level)); }
static inline struct head *row_of(const struct table *t, i64 s, u64 row) {
    return (struct head *)(span(t, s) + ROWS_AT + (i64)row * t->row_bytes);
}
static inline u32 *free_of(const struct table *t, i64 s) { return (u32 *)(span(t, s) + FREE_AT); }
static inline i64 home(const struct table *t, u64 hash) { return t->bits ? (i64)(hash >> (64 - t->bits)) : 0; }
static inline u64 tag_of(u64 hash) { return hash >> 20 & 0xffffffffull; }
static inline uint16_t *sketch_of(const struct table *t, int which) {
    return (uint16_t *)(t->base + ((i64)1 << (t->bits + SPAN_BITS)) + HEAD_BYTES + ((i64)which << (SKETCH_BITS + 1)));
}
/* Both cells of a key lie in its shard's part of the sketch, whatever the number of shards (at most 64). */
static inline u32 cell_of(u64 hash, int which) {
    u32 first = (u32)(hash >> (64 - SKETCH_BITS));
    u32 rest = (u32)(hash >> 8) & ((1u << (SKETCH_BITS - 6)) - 1);
    return which ? (first & ~((1u << (SKETCH_BITS - 6)) - 1)) | rest : first;
}
static inline int aged(const struct table *t, const struct head *row, i64 step) { return t->max_age > 0 && step - row->last > t->max_age; }

/* The place of a key in the index, or the empty one where it would go. */
static inline u64 probe(const struct table *t, i64 s, u64 level, i64 key, u64 hash, struct head **found) {
    const u64 *index = index_of(t, s, level), mask = (1ull << level) - 1;
    u64 at = hash & mask;
    *found = 0;
    for (u64 k = 0; k <= mask; k++, at = (at + 1) & mask) {
        u64 entry = LOAD(((u64 *)index)[at]);
        if (!entry) return at;
        if (entry >> 32 != tag_of(hash)) continue;
        struct head *row = row_of(t, s, (entry & 0xffffffffull) - 1);
        if (row->key == key && row->live) {
            *found = row;
            return at;
        }
    }
    return 0;
}

static int reserve(const struct table *t, char *from, i64 size) {
    return posix_fallocate((int)t->fd, from - t->base, size) ? NO_MEMORY : DONE;
}

/* -- one writer at a time -------------------------------------------------------------------------------------------------- */

static void rebuild(const struct table *t, i64 s) {
    struct shard *c = shard_of(t, s);
    u64 *index = index_of(t, s, c->level), mask = (1ull << c->level) - 1;
    STORE(c->structure, c->structure | 1);
    FENCE();
    memset(index, 0, (size_t)8 << c->level);
    u64 live = 0, dead = 0;
    for (u64 r = 0; r < c->rows_used; r++) {
        struct head *row = row_of(t, s, r);
        if (!row->live) {
            free_of(t, s)[dead++] = (u32)r;
            continue;
        }
        u64 hash = shoal_hash(row->key), at = hash & mask;
        while (index[at]) at = (at + 1) & mask;
        index[at] = tag_of(hash) << 32 | (r + 1);
        live++;
    }
    c->free_count = dead;
    c->live = live;
    FENCE();
    STORE(c->structure, c->structure + 1);
}

/* Put back what an unfinished push has changed, the last change first. */
static void roll_back(const struct table *t, i64 s) {
    struct shard *c = shard_of(t, s);
    char *undo = span(t, s) + UNDO_AT;
    const i64 rest = t->row_bytes - (i64)offsetof(struct head, live);
    for (u64 end = c->undo; end;) {
        struct note *n = (struct note *)(undo + end - sizeof(struct note));
        end -= sizeof(struct note);
        if (n->kind == SEEN) {
            sketch_of(t, (int)(n->at >> 31))[n->at & 0x7fffffffu] = (uint16_t)n->before;
            continue;
        }
        struct head *row = row_of(t, s, n->at);
        u32 version = row->version | 1;
        STORE(row->version, version);
        FENCE();
        if (n->kind == MADE) {
            row->live = 0;
            row->key = 0;
        } else {
            end -= (u64)((rest + 7) & ~(i64)7);
            memcpy(&row->live, undo + end, (size_t)rest);
        }
        FENCE();
        STORE(row->version, version + 1);
    }
}

static u64 *ledger_word(const struct table *t, i64 s, u64 id) {
    return (u64 *)(span(t, s) + LEDGER_AT) + (id % LEDGER_BITS) / 64;
}

/* Ids below ``base`` are taken for applied; let the window end beyond ``next``. */
static void slide(const struct table *t, i64 s, u64 next) {
    struct shard *c = shard_of(t, s);
    if (next <= c->ledger_next) return;
    c->pending_next = next;
    FENCE();
    u64 first = next - c->ledger_next >= LEDGER_BITS ? next - LEDGER_BITS : c->ledger_next;
    for (u64 id = first; id < next; id++) *ledger_word(t, s, id) &= ~(1ull << id % 64);
    if (next > LEDGER_BITS && next - LEDGER_BITS > c->ledger_base) c->ledger_base = next - LEDGER_BITS;
    FENCE();
    c->ledger_next = next;
    FENCE();
    c->pending_next = 0;
}

static void finish(const struct table *t, i64 s) {
    struct shard *c = shard_of(t, s);
    if (c->pending != ~0ull) *ledger_word(t, s, c->pending) |= 1ull << c->pending % 64;
    FENCE();
    STORE(c->undo, 0);
    STORE(c->phase, IDLE);
}

static void mend(const struct table *t, i64 s) {
    struct shard *c = shard_of(t, s);
    if (c->pending_next) slide(t, s, c->pending_next);
    if (c->phase == IDLE && !(c->structure & 1)) return;
    c->repairs++;
    if (c->phase == APPLYING) {
        roll_back(t, s);
        FENCE();
        /* The index may name rows that are gone. Mended again from here if this process is killed as well. */
        STORE(c->phase, REBUILDING);
        STORE(c->undo, 0);
    }
    if (c->phase == COMMITTED) {
        finish(t, s);
        return;
    }
    rebuild(t, s);
    STORE(c->phase, IDLE);
}

int shoal_rows_lock(const struct table *t, i64 s, double timeout_s) {
    struct shard *c = shard_of(t, s);
    struct timespec until;
    int error = pthread_mutex_trylock(&c->lock);
    if (error == EBUSY) {
        clock_gettime(CLOCK_REALTIME, &until);
        i64 ns = until.tv_nsec + (i64)((timeout_s - (double)(i64)timeout_s) * 1e9);
        until.tv_sec += (time_t)timeout_s + ns / 1000000000;
        until.tv_nsec = ns % 1000000000;
        error = pthread_mutex_timedlock(&c->lock, &until);
    }
    if (error == EOWNERDEAD) {
        pthread_mutex_consistent(&c->lock);
        error = 0;
    }
    if (error) return BUSY;
    if (c->phase != IDLE || c->pending_next || (c->structure & 1)) mend(t, s);
    return DONE;
}

void shoal_rows_unlock(const struct table *t, i64 s) { pthread_mutex_unlock(&shard_of(t, s)->lock); }

int shoal_rows_create(const struct table *t) {
    pthread_mutexattr_t kind;
    pthread_mutexattr_init(&kind);
    pthread_mutexattr_setpshared(&kind, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
    for (i64 s = 0; s < (i64)1 << t->bits; s++) {
        struct shard *c = shard_of(t, s);
        if (reserve(t, (char *)c, LEDGER_AT + LEDGER_BITS / 8) || reserve(t, (char *)index_of(t, s, LEAST_LEVEL), 8 << LEAST_LEVEL))
            return NO_MEMORY;
        c->level = LEAST_LEVEL;
        pthread_mutex_init(&c->lock, &kind);
    }
    if (t->admit > 1 && reserve(t, (char *)sketch_of(t, 0), (i64)4 << SKETCH_BITS)) return NO_MEMORY;
    return DONE;
}

/* -- room ---------------------------------------------------------------------------------------------------------------------- */

static int extend(const struct table *t, u64 *reserved, char *area, i64 want, i64 most) {
    i64 have = (i64)*reserved;
    if (want <= have) return DONE;
    /* An eighth more each time, so that reserving costs little and wastes little. */
    i64 to = have + have / 8 + 4096;
    if (to < want) to = want;
    to = (to + 65535) & ~(i64)65535;
    if (to > most) to = most;
    if (want > to) return FULL;
    if (reserve(t, area + have, to - have)) {
        to = (want + 4095) & ~(i64)4095;
        if (to > most || reserve(t, area + have, to - have)) return NO_MEMORY;
    }
    STORE(*reserved, (u64)to);
    return DONE;
}

/* See to it that so many rows can be made and noted in the undo log, ``changed`` of them as they were, and that the index stays at
 * most 5/8 full. */
static int make_room(const struct table *t, i64 s, i64 rows, i64 changed) {
    struct shard *c = shard_of(t, s);
    i64 fresh = rows > (i64)c->free_count ? rows - (i64)c->free_count : 0;
    i64 notes = changed * ((t->row_bytes + 7) & ~(i64)7) + rows * (i64)sizeof(struct note) * 3;
    if ((i64)c->rows_used + fresh > t->capacity) return FULL;
    int error = extend(t, &c->rows_reserved, span(t, s) + ROWS_AT, ((i64)c->rows_used + fresh) * t->row_bytes,
                       ((i64)1 << SPAN_BITS) - ROWS_AT - HEAD_BYTES);
    if (!error) error = extend(t, &c->undo_reserved, span(t, s) + UNDO_AT, notes, ROWS_AT - UNDO_AT);
    if (error) return error;
    u64 level = c->level;
    while ((c->live + (u64)rows) * 8 > 5ull << level) level++;
    if (level > MOST_LEVEL) return FULL;
    if (level == c->level) return DONE;
    if (reserve(t, (char *)index_of(t, s, level), (i64)8 << level)) return NO_MEMORY;
    /* Every dead row may have to go to the list of free ones. */
    if (reserve(t, (char *)free_of(t, s), (i64)(c->rows_used + 1) * 4)) return NO_MEMORY;
    char *old = (char *)index_of(t, s, c->level);
    i64 old_bytes = (i64)8 << c->level;
    STORE(c->structure, c->structure | 1);
    STORE(c->phase, REBUILDING);
    FENCE();
    STORE(c->level, level);
    FENCE();
    rebuild(t, s);
    STORE(c->phase, IDLE);
    if (old_bytes >= 4096) fallocate((int)t->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, old - t->base, old_bytes);
    return DONE;
}

/* -- applying ------------------------------------------------------------------------------------------------------------------ */

static inline void note_down(const struct table *t, i64 s, u32 kind, u32 at, u64 before, const struct head *row) {
    struct shard *c = shard_of(t, s);
    char *undo = span(t, s) + UNDO_AT + c->undo;
    u64 size = 0;
    if (row) {
        const i64 rest = t->row_bytes - (i64)offsetof(struct head, live);
        memcpy(undo, &row->live, (size_t)rest);
        size = (u64)((rest + 7) & ~(i64)7);
    }
    *(struct note *)(undo + size) = (struct note){kind, at, before};
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    STORE(c->undo, c->undo + size + sizeof(struct note));
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

/* Tell whoever listens that a row changes. It may be undone again: then it is only read once more. */
static inline void note_change(const struct table *t, i64 s, i64 key) {
    struct shard *c = shard_of(t, s);
    if (!c->heard) return;
    ((i64 *)(span(t, s) + CHANGES_AT))[c->changes & (c->heard - 1)] = key;
    STORE(c->changes, c->changes + 1);
}

/* Whether a key that has no row was seen often enough to get one; counts it. */
static int admitted(const struct table *t, i64 s, u64 hash, u32 count) {
    if (t->admit <= 1) return 1;
    u32 cell[2] = {cell_of(hash, 0), cell_of(hash, 1)};
    uint16_t *a = sketch_of(t, 0) + cell[0], *b = sketch_of(t, 1) + cell[1];
    u32 seen = (*a < *b ? *a : *b) + count;
    if (seen > 65535) seen = 65535;
    for (int k = 0; k < 2; k++) {
        uint16_t *at = k ? b : a;
        if (*at >= seen) continue;
        note_down(t, s, SEEN, (u32)k << 31 | cell[k], *at, 0);
        *at = (uint16_t)seen;
    }
    return seen >= (u32)t->admit;
}

/* ``raw``: its numbers are about to be put there. */
static struct head *make_row(const struct table *t, i64 s, i64 key, u64 hash, i64 raw) {
    struct shard *c = shard_of(t, s);
    u64 r = c->free_count ? free_of(t, s)[c->free_count - 1] : c->rows_used;
    note_down(t, s, MADE, (u32)r, 0, 0);
    if (c->free_count) STORE(c->free_count, c->free_count - 1);
    else STORE(c->rows_used, c->rows_used + 1);
    struct head *row = row_of(t, s, r), *none;
    STORE(row->version, row->version | 1);
    FENCE();
    row->key = key;
    row->count = 0;
    row->last = 0;
    if (!raw) shoal_rows_init(t, key, row + 1);
    STORE(row->live, 1);
    u64 at = probe(t, s, c->level, key, hash, &none);
    STORE(index_of(t, s, c->level)[at], tag_of(hash) << 32 | (r + 1));
    c->live++;
    return row;
}

/* A row that begins anew, in place. */
static void begin_again(const struct table *t, struct head *row) {
    row->count = 0;
    shoal_rows_init(t, row->key, row + 1);
}

static inline void prefetch_row(const struct table *t, const char *row) {
    for (i64 at = 0; at < t->row_bytes; at += LINE) __builtin_prefetch(row + at, 1, 3);
}

/* What is to be applied to one shard. With ``raw`` the rows are whole ones (weights and state) that are put there as they are. */
struct push {
    const i64 *keys;
    const u32 *counts;
    const char *rows;
    const i64 *last;
    const u32 *order;
    i64 n, id, step;
    double scale;
    i64 raw, overwrite;
};

static void apply_one(const struct table *t, i64 s, const struct push *p, i64 at, u64 hash, struct head *row) {
    const i64 step = p->step;
    const char *given = p->rows + at * (p->raw ? t->width + t->state : t->width) * t->itemsize;
    u32 count = p->counts ? p->counts[at] : 1;
    int fresh = !row;
    if (p->raw) {
        if (row && !p->overwrite) return;
    } else if (!row && !admitted(t, s, hash, count))
        return;
    note_change(t, s, p->keys[at]);
    if (fresh) row = make_row(t, s, p->keys[at], hash, p->raw);
    else note_down(t, s, CHANGED, (u32)(((char *)row - (char *)row_of(t, s, 0)) / t->row_bytes), 0, row);
    STORE(row->version, row->version | 1);
    FENCE();
    if (p->raw) {
        memcpy(row + 1, given, (size_t)((t->width + t->state) * t->itemsize));
        row->count = count;
        row->last = p->last ? p->last[at] : step;
    } else {
        if (!fresh && aged(t, row, step)) begin_again(t, row);
        shoal_rows_update(t, row + 1, given, p->scale, step);
        row->count = row->count + count < row->count ? ~0u : row->count + count;
        row->last = step;
    }
    FENCE();
    STORE(row->version, row->version + 1);
}

int shoal_rows_apply(const struct table *t, i64 s, const struct push *p, double timeout_s) {
    struct shard *c = shard_of(t, s);
    int error = shoal_rows_lock(t, s, timeout_s);
    if (error) return error;
    if (p->id >= 0) {
        u64 id = (u64)p->id;
        if (id < c->ledger_base || (id < c->ledger_next && *ledger_word(t, s, id) >> id % 64 & 1)) {
            shoal_rows_unlock(t, s);
            return DUPLICATE;
        }
        slide(t, s, id + 1);
    }
    /* Whole rows come in bulk, with different keys: no more of them can be changed than there are. */
    error = make_room(t, s, p->n, p->raw && (i64)c->live < p->n ? (i64)c->live : p->n);
    if (error) {
        shoal_rows_unlock(t, s);
        return error;
    }
    c->pending = p->id >= 0 ? (u64)p->id : ~0ull;
    STORE(c->undo, 0);
    FENCE();
    STORE(c->phase, APPLYING);
    FENCE();
    u64 hashes[BLOCK];
    struct head *rows[BLOCK];
    for (i64 first = 0; first < p->n; first += BLOCK) {
        i64 m = p->n - first < BLOCK ? p->n - first : BLOCK;
        for (i64 i = 0; i < m; i++) {
            i64 at = p->order ? p->order[first + i] : first + i;
            hashes[i] = shoal_hash(p->keys[at]);
            __builtin_prefetch(index_of(t, s, c->level) + (hashes[i] & ((1ull << c->level) - 1)));
        }
        for (i64 i = 0; i < m; i++) {
            i64 at = p->order ? p->order[first + i] : first + i;
            probe(t, s, c->level, p->keys[at], hashes[i], &rows[i]);
            if (rows[i]) prefetch_row(t, (char *)rows[i]);
        }
        for (i64 i = 0; i < m; i++) apply_one(t, s, p, p->order ? p->order[first + i] : first + i, hashes[i], rows[i]);
    }
    FENCE();
    c->pushes++;
    STORE(c->phase, COMMITTED);
    finish(t, s);
    shoal_rows_unlock(t, s);
    return DONE;
}

/* The same for shards one after the other: shard first + k gets what lies from starts[k] to starts[k + 1], of the order where there is
 * one. Returns to how many it was new, or what went wrong; then failed says where. */
i64 shoal_rows_apply_all(const struct table *t, i64 first, i64 shards, const struct push *p, const i64 *starts, double timeout_s, i64 *failed) {
    i64 applied = 0, each = (p->raw ? t->width + t->state : t->width) * t->itemsize;
    for (i64 k = 0; k < shards; k++) {
        struct push own = *p;
        own.n = starts[k + 1] - starts[k];
        if (!own.n && own.id < 0) continue;
        if (own.order) own.order += starts[k];
        else {
            own.keys += starts[k];
            own.counts += own.counts ? starts[k] : 0;
            own.rows += starts[k] * each;
            own.last += own.last ? starts[k] : 0;
        }
        int done = shoal_rows_apply(t, first + k, &own, timeout_s);
        *failed = first + k;
        if (done < 0) return done;
        applied += done == DONE;
    }
    return applied;
}

/* Forget rows, by their numbers; the lock is held. */
int shoal_rows_remove(const struct table *t, i64 s, const u32 *rows, i64 n) {
    struct shard *c = shard_of(t, s);
    if (reserve(t, (char *)free_of(t, s), (i64)(c->rows_used + 1) * 4)) return NO_MEMORY;
    STORE(c->structure, c->structure | 1);
    STORE(c->phase, REBUILDING);
    FENCE();
    for (i64 i = 0; i < n; i++) {
        struct head *row = row_of(t, s, rows[i]);
        STORE(row->version, row->version | 1);
        FENCE();
        row->live = 0;
        row->key = 0;
        FENCE();
        STORE(row->version, row->version + 1);
    }
    rebuild(t, s);
    STORE(c->phase, IDLE);
    return DONE;
}

/* Say that pushes before ``id`` were applied and none from it on: others count now; the lock is held. */
void shoal_rows_begin_at(const struct table *t, i64 s, i64 id) {
    struct shard *c = shard_of(t, s);
    /* What the window holds beyond is cleared when it gets there. */
    c->ledger_next = c->ledger_base = (u64)id;
}

/* -- reading ------------------------------------------------------------------------------------------------------------------- */

static inline void mark(const struct table *t, i64 s, u64 hash) {
    u64 bit = hash >> 16 & ((1ull << FILTER_BITS) - 1);
    ((unsigned char *)span(t, s) + FILTER_AT)[bit / 8] |= (unsigned char)(1u << bit % 8);
}

/* Note that these keys are in the store of cold rows; the lock is held. */
int shoal_rows_mark(const struct table *t, i64 s, const i64 *keys, i64 n) {
    struct shard *c = shard_of(t, s);
    if (!c->spilled && reserve(t, span(t, s) + FILTER_AT, (i64)1 << (FILTER_BITS - 3))) return NO_MEMORY;
    for (i64 i = 0; i < n; i++) mark(t, s, shoal_hash(keys[i]));
    FENCE();
    STORE(c->spilled, c->spilled + (u64)n);
    return DONE;
}

static inline int maybe_spilled(const struct table *t, i64 s, u64 hash) {
    if (!LOAD(shard_of(t, s)->spilled)) return 0;
    u64 bit = hash >> 16 & ((1ull << FILTER_BITS) - 1);
    return ((unsigned char *)span(t, s) + FILTER_AT)[bit / 8] >> bit % 8 & 1;
}

/* Copy one row's weights, never half of a push: 0 found, 1 there is none, STUCK where somebody does not finish writing. */
static int read_row(const struct table *t, i64 s, i64 key, u64 hash, i64 step, void *out, u32 *seen) {
    struct shard *c = shard_of(t, s);
    const size_t size = (size_t)(t->width * t->itemsize);
    for (i64 tries = 0; tries < MOST_TRIES; tries++) {
        u64 structure = LOAD(c->structure);
        struct head *row;
        if (structure & 1) continue;
        probe(t, s, LOAD(c->level), key, hash, &row);
        if (!row) {
            FENCE();
            if (LOAD(c->structure) == structure) return 1;
            continue;
        }
        u32 version = LOAD(row->version);
        if (version & 1) continue;
        i64 found = row->key;
        int old = aged(t, row, step);
        *seen = row->count;
        memcpy(out, row + 1, size);
        FENCE();
        if (LOAD(row->version) != version || found != key) continue;
        return old ? 1 : 0;
    }
    return STUCK;
}

/* Copy the weights of n different keys to out; what has no row is what it would begin with. flags: 1 where there was none, 3 where
 * the store of cold rows may have it. Returns how many flags are 3, or STUCK - the shard. */
i64 shoal_rows_pull(const struct table *t, const i64 *keys, i64 n, i64 step, char *out, unsigned char *flags) {
    u64 hashes[BLOCK];
    i64 cold = 0, size = t->width * t->itemsize;
    char *first_row = t->state ? malloc((size_t)((t->width + t->state) * t->itemsize)) : 0;
    for (i64 first = 0; first < n; first += BLOCK) {
        i64 m = n - first < BLOCK ? n - first : BLOCK;
        for (i64 i = 0; i < m; i++) {
            hashes[i] = shoal_hash(keys[first + i]);
            i64 s = home(t, hashes[i]);
            u64 level = LOAD(shard_of(t, s)->level);
            __builtin_prefetch(index_of(t, s, level) + (hashes[i] & ((1ull << level) - 1)));
        }
        for (i64 i = 0; i < m; i++) {
            i64 s = home(t, hashes[i]);
            u64 level = LOAD(shard_of(t, s)->level), entry = LOAD(index_of(t, s, level)[hashes[i] & ((1ull << level) - 1)]);
            if (!entry) continue;
            const char *row = (const char *)row_of(t, s, (entry & 0xffffffffull) - 1);
            for (i64 at = 0; at < size + (i64)sizeof(struct head); at += LINE) __builtin_prefetch(row + at, 0, 3);
        }
        for (i64 i = 0; i < m; i++) {
            i64 at = first + i, s = home(t, hashes[i]);
            u32 seen;
            int error = read_row(t, s, keys[at], hashes[i], step, out + at * size, &seen);
            flags[at] = 0;
            if (error == 0) continue;
            if (error < 0) {
                free(first_row);
                return STUCK - s;
            }
            flags[at] = 1;
            if (maybe_spilled(t, s, hashes[i])) flags[at] = 3, cold++;
            if (!first_row) shoal_rows_init(t, keys[at], out + at * size);
            else {
                shoal_rows_init(t, keys[at], first_row);
                memcpy(out + at * size, first_row, (size_t)size);
            }
        }
    }
    free(first_row);
    return cold;
}
