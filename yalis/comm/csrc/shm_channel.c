/* Messages from one process of a host to another through a ring in shared memory: one producer, one consumer.
 *
 * Two counters of bytes, each written by one side: `written` by the producer, `read` by the consumer. What lies between
 * them is in the ring; the producer has room for `capacity` less that. A message is a line with its length, then its
 * bytes, filled up to whole lines of 64 bytes. It may be longer than the ring: each side says how much of it has gone
 * through (`moved`, length line included) and goes on from there. Counters wrap at 2^32, a multiple of the capacity.
 *
 * Bytes are made known in pieces, so that the consumer copies the first while the producer copies the next.
 */
#define _GNU_SOURCE
#include "shm_wait.h"

#include <stdlib.h>

#define UNIT 64
#define PIECE (64 * 1024)

typedef struct {
    beacon written;
    char pad[LINE - sizeof(beacon)];
    beacon read;
    char pad2[LINE - sizeof(beacon)];
} ends;

_Static_assert(sizeof(ends) == 2 * LINE, "each side has lines of its own");

typedef struct {
    ends *ends;
    char *data;
    uint32_t capacity;
    int pidfd; /* of the other side; -1 where unknown */
    int64_t spin_ns, yield_ns;
    const int32_t *abort_word;
    _Atomic int32_t stop; /* ends a wait of this side */
} channel;

size_t yalis_channel_bytes(size_t capacity) { return sizeof(ends) + capacity; }

/* base: a zeroed mapping of yalis_channel_bytes; capacity: a power of two, at least 64, below 2^31; producer: which side
 * this is; first: where counting starts, the same on both sides, a multiple of 64. */
channel *yalis_channel_open(void *base, size_t capacity, int producer, uint32_t first, int pidfd,
                            int64_t spin_ns, int64_t yield_ns, const int32_t *abort_word) {
    if (capacity < UNIT || capacity >= 1u << 31 || (capacity & (capacity - 1))) return NULL;
    channel *c = calloc(1, sizeof *c);
    if (!c) return NULL;
    c->ends = base;
    c->data = (char *)base + sizeof(ends);
    c->capacity = (uint32_t)capacity;
    c->pidfd = pidfd;
    c->spin_ns = spin_ns;
    c->yield_ns = yield_ns;
    c->abort_word = abort_word;
    atomic_store(producer ? &c->ends->written.value : &c->ends->read.value, first);
    return c;
}

void yalis_channel_close(channel *c) { free(c); }

/* Let a call of this side in another thread end, and every later one. */
void yalis_channel_stop(channel *c) { atomic_store(&c->stop, 1); }

static size_t whole(size_t bytes) { return UNIT + (bytes + UNIT - 1) / UNIT * UNIT; }

static uint32_t counter(beacon *b) { return atomic_load_explicit(&b->value, memory_order_acquire); }

/* Bytes of the message itself in the `n` bytes of its passage from `moved` on. */
static size_t payload(size_t bytes, size_t moved, size_t n) {
    size_t from = moved - UNIT, left = from < bytes ? bytes - from : 0;
    return left < n ? left : n;
}

/* Largest step from `at`: to the end of the ring at most, a length line alone. */
static size_t step(const channel *c, uint32_t at, size_t room, size_t moved, size_t total) {
    size_t n = total - moved < room ? total - moved : room;
    size_t straight = c->capacity - (at & (c->capacity - 1));
    if (n > straight) n = straight;
    if (n > PIECE) n = PIECE;
    return moved == 0 && n > UNIT ? UNIT : n;
}

/* Put in what fits now; returns how much of the passage is over: whole(bytes) when all of it is. */
int64_t yalis_channel_push(channel *c, const void *x, size_t bytes, size_t moved) {
    size_t total = whole(bytes);
    uint32_t at = atomic_load_explicit(&c->ends->written.value, memory_order_relaxed), known = at;
    while (moved < total) {
        size_t n = step(c, at, c->capacity - (at - counter(&c->ends->read)), moved, total);
        if (n == 0) break;
        char *to = c->data + (at & (c->capacity - 1));
        if (moved == 0)
            memcpy(to, &bytes, sizeof bytes);
        else
            memcpy(to, (const char *)x + (moved - UNIT), payload(bytes, moved, n));
        moved += n;
        at += (uint32_t)n;
        if (n > UNIT || moved == total) { /* not for a length line alone: its message follows at once */
            beacon_publish(&c->ends->written, at);
            known = at;
        }
    }
    if (at != known) beacon_publish(&c->ends->written, at);
    return (int64_t)moved;
}

/* Take out what is there; as push. A message of another length: -1 - its length, and it stays. */
int64_t yalis_channel_pull(channel *c, void *out, size_t bytes, size_t moved) {
    size_t total = whole(bytes);
    uint32_t at = atomic_load_explicit(&c->ends->read.value, memory_order_relaxed), known = at;
    while (moved < total) {
        size_t n = step(c, at, counter(&c->ends->written) - at, moved, total);
        if (n == 0) break;
        const char *from = c->data + (at & (c->capacity - 1));
        if (moved == 0) {
            size_t sent;
            memcpy(&sent, from, sizeof sent);
            if (sent != bytes) return -1 - (int64_t)sent;
        } else {
            memcpy((char *)out + (moved - UNIT), from, payload(bytes, moved, n));
        }
        moved += n;
        at += (uint32_t)n;
        if (n > UNIT || moved == total) {
            beacon_publish(&c->ends->read, at);
            known = at;
        }
    }
    if (at != known) beacon_publish(&c->ends->read, at);
    return (int64_t)moved;
}

/* Wait until `push` can go on, or `pull` of the other side's messages; LATE after the budget. */
int yalis_channel_wait_room(channel *c, int64_t budget_ns) {
    uint32_t at = atomic_load_explicit(&c->ends->written.value, memory_order_relaxed);
    patience p = {budget_ns, c->spin_ns, c->yield_ns, c->abort_word};
    return beacon_wait(&p, &c->ends->written, &c->ends->read, at - c->capacity + UNIT, c->pidfd, &c->stop);
}

int yalis_channel_wait_bytes(channel *c, int64_t budget_ns) {
    uint32_t at = atomic_load_explicit(&c->ends->read.value, memory_order_relaxed);
    patience p = {budget_ns, c->spin_ns, c->yield_ns, c->abort_word};
    return beacon_wait(&p, &c->ends->read, &c->ends->written, at + UNIT, c->pidfd, &c->stop);
}
