/* What the ranks of a circle give each other, moved round by round through their seats in shared memory.
 *
 * A seat belongs to one rank of one circle and only that rank writes there. It begins with a word that counts what its
 * rank has posted (first cache line), a flag that says whether the rank sleeps (second line); from SEAT_HEAD on come two
 * halves, used in turn, each a line that says which exchange this is and how many rounds it needs, and then the bytes.
 *
 * A round: write into the seat what the others get, post, wait for everybody, read. Whoever has seen all of a round's
 * posts knows that everybody has finished reading the round before: so two halves suffice, and nobody is acknowledged.
 * The state lies in `struct exchange`: advance() gives up when it would have to sleep for longer, and is called again.
 */
#define _GNU_SOURCE
#include <string.h>

#include "waiting.h"

enum { MEMBERS = 64, LINE = 64, SEAT_HEAD = 256 };
enum { SHARED = 1, REDUCE = 2, BACK = 4 };
enum { FINISHED = -1, REDUCE_PLEASE = -2, MISMATCH = -3 };
enum { WRITE, READ, READ_REDUCED, RETURNED, DONE };
enum { F32 = 1, F64 = 2, BF16 = 3, I64 = 4 };

/* The ranks that meet, seen from one of them; the same layout as Circle in rounds.py. */
struct circle {
    int32_t n, me;
    uint32_t turn, posted;
    int64_t piece;
    char *seats[MEMBERS];
};

/* One exchange; the same layout as Exchange in rounds.py. `send[j]` is what rank j gets of me, `recv[j]` what I get of
 * rank j. SHARED: everybody gets the same, send[me]. REDUCE: what I get from all becomes one, recv[me]. BACK: what each
 * has made of its part goes to everybody. */
struct exchange {
    struct circle *circle;
    int32_t flags, phase, dtype, other;
    int64_t divisor, round, rounds, part;
    uint64_t signature;
    char *send[MEMBERS], *recv[MEMBERS];
    int64_t send_bytes[MEMBERS], recv_bytes[MEMBERS];
};

void shoal_sum_f32(float *dst, float **src, int n, int64_t count, float scale);
void shoal_sum_f64(double *dst, double **src, int n, int64_t count, double scale);

static inline uint32_t *word_of(char *seat) { return (uint32_t *)seat; }
static inline uint32_t *sleeps(char *seat) { return (uint32_t *)(seat + LINE); }

/* Say what an exchange is in which every rank gives `given` (bytes for all where SHARED, else so many for each in turn) and
 * takes `taken` (of each in turn, or once what is reduced). What a rank gives itself is copied at once. */
void shoal_lay(struct exchange *x, int32_t flags, int32_t dtype, int64_t divisor, uint64_t signature, char *given,
               int64_t given_bytes, char *taken, int64_t taken_bytes) {
    struct circle *c = x->circle;
    x->flags = flags, x->dtype = dtype, x->divisor = divisor, x->signature = signature;
    for (int k = 0; k < c->n; k++) {
        int gives = !(flags & SHARED) || k == c->me, takes = !(flags & REDUCE) || k == c->me;
        x->send[k] = flags & SHARED ? given : given + k * given_bytes;
        x->send_bytes[k] = gives ? given_bytes : 0;
        x->recv[k] = flags & REDUCE ? taken : taken + k * taken_bytes;
        x->recv_bytes[k] = takes ? taken_bytes : 0;
    }
    if (!(flags & REDUCE) && x->recv[c->me] != x->send[c->me]) memcpy(x->recv[c->me], x->send[c->me], given_bytes);
    int64_t most = given_bytes > taken_bytes ? given_bytes : taken_bytes;
    x->part = flags & SHARED ? c->piece : c->piece / c->n / LINE * LINE;
    x->phase = WRITE, x->round = 0, x->rounds = most > x->part ? (most + x->part - 1) / x->part : 1;
}

/* Publish what was written. The system is only asked to wake somebody where somebody sleeps: either the sleeper's last
 * look sees the word, or this look sees its flag. */
static void post(struct circle *c) {
    char *mine = c->seats[c->me];
    publish(word_of(mine), ++c->posted);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (int k = 0; k < c->n; k++) {
        if (!__atomic_load_n(sleeps(c->seats[k]), __ATOMIC_RELAXED)) continue;
        wake(word_of(mine));
        return;
    }
}

/* Wait until everybody has posted as often as I have. -1, or whom to wait for once the nap is over. */
static int await_all(struct circle *c, int64_t spin_ns, int yields, int64_t nap_ns) {
    struct patience patience = {spin_ns, 0, yields};
    for (int k = 0; k < c->n; k++)
        if (k != c->me && !await_word(word_of(c->seats[k]), c->posted, sleeps(c->seats[c->me]), &patience, nap_ns))
            return k;
    return -1;
}

static inline float from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* Summed in single precision, rounded once at the end. */
static void sum_bf16(uint16_t *dst, uint16_t **src, int n, int64_t count, int64_t divisor) {
    enum { BLOCK = 1024 };
    float sum[BLOCK];
    for (int64_t at = 0; at < count; at += BLOCK) {
        int64_t m = count - at < BLOCK ? count - at : BLOCK;
        for (int64_t i = 0; i < m; i++) sum[i] = from_bf16(src[0][at + i]);
        for (int k = 1; k < n; k++)
            for (int64_t i = 0; i < m; i++) sum[i] += from_bf16(src[k][at + i]);
        if (divisor > 1)
            for (int64_t i = 0; i < m; i++) sum[i] /= (float)divisor;
        for (int64_t i = 0; i < m; i++) dst[at + i] = to_bf16(sum[i]);
    }
}

static void sum_i64(int64_t *dst, int64_t **src, int n, int64_t count, int64_t divisor) {
    for (int64_t i = 0; i < count; i++) {
        uint64_t sum = (uint64_t)src[0][i];
        for (int k = 1; k < n; k++) sum += (uint64_t)src[k][i];
        dst[i] = divisor > 1 ? (int64_t)sum / divisor : (int64_t)sum;
    }
}

/* dst = src[0] + ... + src[n-1], divided where a divisor is given. */
static void reduce(int dtype, char *dst, char **src, int n, int64_t bytes, int64_t divisor) {
    if (dtype == F32) {
        shoal_sum_f32((float *)dst, (float **)src, n, bytes / 4, 1.0f);
        if (divisor > 1)
            for (int64_t i = 0; i < bytes / 4; i++) ((float *)dst)[i] /= (float)divisor;
    } else if (dtype == F64) {
        shoal_sum_f64((double *)dst, (double **)src, n, bytes / 8, 1.0);
        if (divisor > 1)
            for (int64_t i = 0; i < bytes / 8; i++) ((double *)dst)[i] /= (double)divisor;
    } else if (dtype == BF16) {
        sum_bf16((uint16_t *)dst, (uint16_t **)src, n, bytes / 2, divisor);
    } else {
        sum_i64((int64_t *)dst, (int64_t **)src, n, bytes / 8, divisor);
    }
}

/* The bytes of a stretch of `whole` that this round moves. */
static inline int64_t stretch(const struct exchange *x, int64_t whole) {
    int64_t left = whole - x->round * x->part;
    return left < 0 ? 0 : left < x->part ? left : x->part;
}

static inline char *half_of(const struct circle *c, int k) {
    return c->seats[k] + SEAT_HEAD + (c->turn & 1) * (LINE + c->piece);
}

static void write_round(struct exchange *x) {
    struct circle *c = x->circle;
    char *half = half_of(c, c->me);
    if (x->round == 0) {
        ((uint64_t *)half)[0] = x->signature;
        ((uint64_t *)half)[1] = (uint64_t)x->rounds;
    }
    int64_t from = x->round * x->part;
    for (int k = 0; k < c->n; k++) {
        int64_t bytes = stretch(x, x->send_bytes[k]);
        if (bytes == 0 || (x->flags & SHARED ? k != c->me : k == c->me)) continue;
        memcpy(half + LINE + (x->flags & SHARED ? 0 : k * x->part), x->send[k] + from, bytes);
    }
}

/* All that were met agree on what this is, and on the rounds of whoever needs most. */
static int agree(struct exchange *x) {
    struct circle *c = x->circle;
    for (int k = 0; k < c->n; k++) {
        const uint64_t *head = (const uint64_t *)half_of(c, k);
        if (head[0] != x->signature) {
            x->other = k;
            return 0;
        }
        if ((int64_t)head[1] > x->rounds) x->rounds = (int64_t)head[1];
    }
    return 1;
}

/* Read what the others gave: the part that is for me, or what each has made of its own. */
static void read_round(struct exchange *x, int reduced) {
    struct circle *c = x->circle;
    for (int k = 0; k < c->n; k++) {
        int64_t bytes = stretch(x, x->recv_bytes[k]);
        if (bytes == 0 || k == c->me) continue;
        int64_t part = x->flags & SHARED ? 0 : reduced ? k : c->me;
        memcpy(x->recv[k] + x->round * x->part, half_of(c, k) + LINE + part * x->part, bytes);
    }
}

static void reduce_round(struct exchange *x) {
    struct circle *c = x->circle;
    int64_t bytes = stretch(x, x->recv_bytes[c->me]), from = x->round * x->part;
    char *sources[MEMBERS] = {NULL};
    for (int k = 0; k < c->n; k++) sources[k] = half_of(c, k) + LINE + (x->flags & SHARED ? 0 : c->me * x->part);
    sources[c->me] = x->send[c->me] + from;
    reduce(x->dtype, x->recv[c->me] + from, sources, c->n, bytes, x->divisor);
}

/* Give the reduced part to all: nobody else reads that place of my seat. */
static void give_back(struct exchange *x) {
    struct circle *c = x->circle;
    int64_t bytes = stretch(x, x->recv_bytes[c->me]);
    if (bytes > 0) memcpy(half_of(c, c->me) + LINE + c->me * x->part, x->recv[c->me] + x->round * x->part, bytes);
}

/* Go on with an exchange as far as it goes. FINISHED; the rank that has not come when spinning, yielding and a nap were
 * over; REDUCE_PLEASE where the caller has to reduce this round's bytes itself and calls again; MISMATCH where rank
 * `other` is about another exchange. */
int shoal_advance(struct exchange *x, int64_t spin_ns, int32_t yields, int64_t nap_ns) {
    struct circle *c = x->circle;
    for (;;) {
        int missing;
        switch (x->phase) {
        case WRITE:
            write_round(x);
            post(c);
            x->phase = READ;
            /* fall through */
        case READ:
            if ((missing = await_all(c, spin_ns, yields, nap_ns)) >= 0) return missing;
            if (x->round == 0 && !agree(x)) return MISMATCH;
            if (!(x->flags & REDUCE)) {
                read_round(x, 0);
                break;
            }
            if (stretch(x, x->recv_bytes[c->me]) > 0) {
                if (x->dtype == 0) {
                    x->phase = READ_REDUCED;
                    return REDUCE_PLEASE;
                }
                reduce_round(x);
            }
            /* fall through */
        case READ_REDUCED:
            if (!(x->flags & BACK)) break;
            give_back(x);
            post(c);
            x->phase = RETURNED;
            /* fall through */
        case RETURNED:
            if ((missing = await_all(c, spin_ns, yields, nap_ns)) >= 0) return missing;
            read_round(x, 1);
            break;
        default:
            return FINISHED;
        }
        c->turn++;
        x->round++;
        x->phase = x->round < x->rounds ? WRITE : DONE;
    }
}
