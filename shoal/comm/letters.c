/* Letters from one rank to another: rings in shared memory, each written by one rank and read by one.
 *
 * A letter holds a short message, or says in which piece of its sender's memory the next stretch of a longer one stands.
 * `head` counts what the writer has written, `tail` what the reader has read: then room and piece may be used again.
 * Which message belongs where is decided above (mailbox.py): here bytes are copied, in one call a message where it can be.
 */
#define _GNU_SOURCE
#include <string.h>

#include "waiting.h"

enum { LETTER = 256 };
enum { INSIDE = -1 };
enum { NOTHING = -1, ANOTHER = -2 };

struct letter {
    uint64_t key;
    int64_t tag, total;
    int32_t bytes, piece;
    char text[LETTER - 32];
};

/* What one rank knows of its letters to and from one other; the same layout as Way in letters.py. */
struct way {
    uint32_t written, freed, read, unused;
    char *outbox, *inbox, *its_pieces;
    uint32_t *head, *its_tail, *its_head, *tail, *it_sleeps;
    int32_t *pieces_used;
};

/* All of a rank's letters; the same layout as Post in letters.py. */
struct post {
    int32_t letters, world_size, pieces_free, unused;
    int64_t piece_bytes;
    char *pieces;
    uint32_t *asleep;
    int32_t *free;
    struct way *ways;
};

static inline struct letter *at(const struct post *p, char *ring, uint32_t number) {
    return (struct letter *)(ring + (int64_t)(number % (uint32_t)p->letters) * LETTER);
}

/* Never more than the ring holds: such a word was emptied, because its rank begins anew. */
static inline uint32_t news(const struct post *p, const uint32_t *word, uint32_t known) {
    uint32_t found = __atomic_load_n(word, __ATOMIC_ACQUIRE) - known;
    return found <= (uint32_t)p->letters ? found : 0;
}

static inline void tell(struct way *w, uint32_t *word, uint32_t value) {
    publish(word, value);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (__atomic_load_n(w->it_sleeps, __ATOMIC_RELAXED)) wake(word);
}

/* Take back the pieces of letters that were read. */
static void take_back(struct post *p, struct way *w) {
    for (uint32_t left = news(p, w->its_tail, w->freed); left > 0; left--) {
        int32_t piece = w->pieces_used[w->freed++ % (uint32_t)p->letters];
        if (piece >= p->world_size) p->free[p->pieces_free++] = piece;
    }
}

/* A piece for a letter; every receiver has one that the others' messages cannot take away. -1: none now. */
static int32_t take_piece(struct post *p, struct way *w, int32_t receiver) {
    if (p->pieces_free > 0) return p->free[--p->pieces_free];
    for (uint32_t k = w->freed; k != w->written; k++)
        if (w->pieces_used[k % (uint32_t)p->letters] == receiver) return -1;
    return receiver;
}

/* Write of a message what there is room for. Returns how many of its bytes have left; NOTHING where there is no room
 * even for an empty one. */
int64_t shoal_write_letters(struct post *p, int32_t receiver, uint64_t key, int64_t tag, int64_t total,
                            const char *bytes, int64_t sent) {
    struct way *w = &p->ways[receiver];
    take_back(p, w);
    int wrote = 0;
    while ((sent < total || !wrote) && w->written - w->freed < (uint32_t)p->letters) {
        struct letter *letter = at(p, w->outbox, w->written);
        int64_t size = total - sent;
        int32_t piece = INSIDE;
        char *place = letter->text;
        if (size > (int64_t)sizeof letter->text) {
            if ((piece = take_piece(p, w, receiver)) < 0) break;
            if (size > p->piece_bytes) size = p->piece_bytes;
            place = p->pieces + piece * p->piece_bytes;
        }
        memcpy(place, bytes + sent, size);
        letter->key = key, letter->tag = tag, letter->total = total;
        letter->bytes = (int32_t)size, letter->piece = piece;
        w->pieces_used[w->written % (uint32_t)p->letters] = piece;
        tell(w, w->head, ++w->written);
        sent += size;
        wrote = 1;
    }
    return wrote || sent > 0 ? sent : NOTHING;
}

/* Wait until a rank has written a letter that was not read. Whether it has. */
int shoal_await_letter(struct post *p, int32_t sender, int64_t spin_ns, int32_t yields, int64_t nap_ns) {
    struct way *w = &p->ways[sender];
    struct patience patience = {spin_ns, 0, yields};
    return await_word(w->its_head, w->read + 1, p->asleep, &patience, nap_ns);
}

/* Wait until a rank has read a letter more. Whether it has. */
int shoal_await_reader(struct post *p, int32_t receiver, int64_t spin_ns, int32_t yields, int64_t nap_ns) {
    struct way *w = &p->ways[receiver];
    struct patience patience = {spin_ns, 0, yields};
    return await_word(w->its_tail, w->freed + 1, p->asleep, &patience, nap_ns);
}

/* Copy what has come of a message, `got` bytes of which were here before. Returns how many are here now; NOTHING where none
 * of it has come, ANOTHER where the next letter begins another message. */
int64_t shoal_read_letters(struct post *p, int32_t sender, uint64_t key, int64_t tag, int64_t total, char *bytes,
                           int64_t got) {
    struct way *w = &p->ways[sender];
    int read = 0;
    for (uint32_t left = news(p, w->its_head, w->read); left > 0 && (got < total || !read); left--) {
        const struct letter *letter = at(p, w->inbox, w->read);
        if (got == 0 && (letter->key != key || letter->tag != tag || letter->total != total)) return ANOTHER;
        const char *place = letter->piece == INSIDE ? letter->text : w->its_pieces + letter->piece * p->piece_bytes;
        memcpy(bytes + got, place, letter->bytes);
        got += letter->bytes;
        read = 1;
        tell(w, w->tail, ++w->read);
    }
    return read || got > 0 ? got : NOTHING;
}

/* The next letter that a rank has written and nobody has read; NULL where there is none. */
const struct letter *shoal_next_letter(const struct post *p, int32_t sender) {
    const struct way *w = &p->ways[sender];
    return news(p, w->its_head, w->read) > 0 ? at(p, w->inbox, w->read) : NULL;
}
