/* Collectives between processes of one host over one shared mapping.
 *
 * Protocol. A collective is a row of stages; all members pass the same stages in the same order. In stage s a member
 *   1. writes what it has to say into its own slot of parity s % 2,
 *   2. publishes: stores s into its flag (release),
 *   3. waits until the flag of every other member is at least s (acquire),
 *   4. reads the others' slots of parity s % 2.
 *
 * Why two slots suffice and nobody acknowledges: a member that writes in stage s has passed the wait of stage s - 1, so
 * every peer has published s - 1; a peer publishes s - 1 only after it finished its reads of stage s - 2, the last stage
 * that used this parity. This needs rule 3 for *every* peer in *every* stage, also in stages where a member has nothing
 * to say (broadcast, barrier, an empty shard). It follows too that a peer is never more than one stage ahead, so its note
 * (below) of this parity cannot be overwritten while it is compared, and stage numbers may wrap: only their difference
 * counts.
 *
 * Bits. An element is summed by members in ascending order, in fp32, and rounded once, whoever computes it and whatever
 * the size of the message: the result is the same on every member and does not depend on the path taken.
 *
 * Waiting: shm_wait.h.
 */
#define _GNU_SOURCE
#include "shm_wait.h"

#include <stdlib.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define MAX_RANKS 64
#define BLOCK 512 /* elements summed at a time: the fp32 accumulator (2 KiB) stays in L1 */

enum { F32 = 0, BF16 = 1, F16 = 2 };
enum { OP_ALL_REDUCE = 1, OP_REDUCE_SCATTER, OP_ALL_GATHER, OP_BROADCAST, OP_BARRIER };

typedef struct {
    beacon stage;     /* last published stage */
    uint64_t note[2]; /* by parity: which call this stage belongs to, to catch ranks that disagree */
    char pad[LINE - sizeof(beacon) - sizeof(uint64_t[2]) - 4];
} flag_line;

_Static_assert(sizeof(flag_line) == LINE, "a flag has lines of its own");

typedef struct {
    flag_line *flags;
    char *slots;
    size_t capacity; /* bytes of one slot */
    int ranks, rank;
    uint32_t stage; /* last stage this member passed */
    patience patience;
    int64_t waited_ns; /* for peers that were not there at the first look */
    int pidfd[MAX_RANKS];
} context;

size_t yalis_shm_bytes(int ranks, size_t capacity) { return (size_t)ranks * (LINE + 2 * capacity); }

/* base: a zeroed mapping of yalis_shm_bytes; capacity: a multiple of 64; pidfds: one per rank, -1 where unknown;
 * first_stage: where counting starts, the same on all ranks. */
context *yalis_shm_open(void *base, int ranks, int rank, size_t capacity, uint32_t first_stage, int64_t timeout_ns,
                        int64_t spin_ns, int64_t yield_ns, const int32_t *abort_word, const int *pidfds) {
    if (ranks < 1 || ranks > MAX_RANKS || rank < 0 || rank >= ranks || capacity < 64 * (size_t)(ranks + 1)) return NULL;
    context *c = aligned_alloc(64, (sizeof *c + 63) / 64 * 64);
    if (!c) return NULL;
    c->flags = base;
    c->slots = (char *)base + (size_t)ranks * LINE;
    c->capacity = capacity;
    c->ranks = ranks;
    c->rank = rank;
    c->stage = first_stage;
    c->patience = (patience){timeout_ns, spin_ns, yield_ns, abort_word};
    c->waited_ns = 0;
    for (int r = 0; r < ranks; r++) c->pidfd[r] = pidfds[r];
    atomic_store(&c->flags[rank].stage.value, first_stage);
    return c;
}

void yalis_shm_close(context *c) { free(c); }

int64_t yalis_shm_waited_ns(const context *c) { return c->waited_ns; }

/* ---- stages ------------------------------------------------------------------------------------------------------ */

static inline char *slot(const context *c, int rank, uint32_t stage) {
    return c->slots + ((size_t)rank * 2 + (stage & 1)) * c->capacity;
}

static inline int reached(context *c, int peer, uint32_t stage) {
    return beacon_reached(&c->flags[peer].stage, stage);
}

static void publish(context *c, uint32_t stage, uint64_t note) {
    flag_line *mine = &c->flags[c->rank];
    mine->note[stage & 1] = note;
    beacon_publish(&mine->stage, stage);
}

/* Result of a call: OK, or kind + 16 * (index of the peer). */
static int failure(int kind, int peer) { return kind + 16 * peer; }

static int await(context *c, uint32_t stage, uint64_t note) {
    for (int i = 1; i < c->ranks; i++) {
        int peer = c->rank + i < c->ranks ? c->rank + i : c->rank + i - c->ranks;
        if (!reached(c, peer, stage)) {
            int64_t since = now_ns();
            int kind = beacon_wait(&c->patience, &c->flags[c->rank].stage, &c->flags[peer].stage, stage, c->pidfd[peer],
                                   NULL);
            c->waited_ns += now_ns() - since;
            if (kind != OK) return failure(kind, peer);
        }
        if (c->flags[peer].note[stage & 1] != note) return failure(MISMATCH, peer);
    }
    return OK;
}

/* Publish this stage and wait for everybody's. */
static int meet(context *c, uint32_t stage, uint64_t note) {
    publish(c, stage, note);
    int result = await(c, stage, note);
    if (result == OK) c->stage = stage;
    return result;
}

static uint64_t make_note(int op, int detail, uint64_t bytes) {
    return (uint64_t)op << 60 | (uint64_t)(detail & 0xff) << 52 | (bytes & 0xfffffffffffffULL);
}

/* ---- sums -------------------------------------------------------------------------------------------------------- */

static inline float from_bf16(uint16_t h) {
    union { uint32_t u; float f; } v = {(uint32_t)h << 16};
    return v.f;
}

static inline uint16_t to_bf16(float f) {
    union { float f; uint32_t u; } v = {f};
    uint32_t nearest_even = (v.u + 0x7fff + (v.u >> 16 & 1)) >> 16;
    uint32_t quiet_nan = v.u >> 16 | 0x40;
    return (uint16_t)((v.u & 0x7fffffff) > 0x7f800000 ? quiet_nan : nearest_even);
}

#if defined(__F16C__)
static inline float from_f16(uint16_t h) { return _cvtsh_ss(h); }
static inline uint16_t to_f16(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
#else
static float from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    union { uint32_t u; float f; } v;
    if (exponent == 31)
        v.u = sign | 0x7f800000 | fraction << 13;
    else if (exponent)
        v.u = sign | (exponent + 112) << 23 | fraction << 13;
    else {
        v.f = (float)fraction * 0x1p-24f;
        v.u |= sign;
    }
    return v.f;
}

static uint16_t to_f16(float f) {
    union { float f; uint32_t u; } v = {f};
    uint32_t sign = v.u >> 16 & 0x8000, magnitude = v.u & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and above round to infinity */
    if (magnitude < 0x38800000) {                                  /* below 2^-14: a multiple of 2^-24 */
        union { uint32_t u; float f; } a = {magnitude};
        a.f = a.f * 0x1p24f + 0x1p23f; /* adding 2^23 rounds to a whole number, ties to even */
        return (uint16_t)(sign | (a.u & 0x7fffff));
    }
    return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}
#endif

static void load_block(float *restrict acc, const char *src, size_t n, int dtype) {
    if (dtype == F32) {
        memcpy(acc, src, n * 4);
    } else if (dtype == BF16) {
        const uint16_t *h = (const uint16_t *)src;
        for (size_t i = 0; i < n; i++) acc[i] = from_bf16(h[i]);
    } else {
        const uint16_t *h = (const uint16_t *)src;
        size_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8) _mm256_storeu_ps(acc + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
#endif
        for (; i < n; i++) acc[i] = from_f16(h[i]);
    }
}

static void add_block(float *restrict acc, const char *src, size_t n, int dtype) {
    if (dtype == F32) {
        const float *x = (const float *)src;
        for (size_t i = 0; i < n; i++) acc[i] += x[i];
    } else if (dtype == BF16) {
        const uint16_t *h = (const uint16_t *)src;
        for (size_t i = 0; i < n; i++) acc[i] += from_bf16(h[i]);
    } else {
        float wide[BLOCK];
        load_block(wide, src, n, dtype);
        for (size_t i = 0; i < n; i++) acc[i] += wide[i];
    }
}

static void store_block(char *dst, const float *restrict acc, size_t n, int dtype) {
    if (dtype == F32) {
        memcpy(dst, acc, n * 4);
    } else if (dtype == BF16) {
        uint16_t *h = (uint16_t *)dst;
        for (size_t i = 0; i < n; i++) h[i] = to_bf16(acc[i]);
    } else {
        uint16_t *h = (uint16_t *)dst;
        size_t i = 0;
#if defined(__F16C__)
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i *)(h + i), _mm256_cvtps_ph(_mm256_loadu_ps(acc + i), _MM_FROUND_TO_NEAREST_INT));
#endif
        for (; i < n; i++) h[i] = to_f16(acc[i]);
    }
}

static inline size_t element_size(int dtype) { return dtype == F32 ? 4 : 2; }

/* dst = sum over r of src[r]; dst may be one of the sources (a block is read from all of them before it is written). */
static void sum(char *dst, const char *const *src, int ranks, size_t n, int dtype) {
    float acc[BLOCK] __attribute__((aligned(64)));
    size_t es = element_size(dtype);
    for (size_t at = 0; at < n; at += BLOCK) {
        size_t m = n - at < BLOCK ? n - at : BLOCK;
        load_block(acc, src[0] + at * es, m, dtype);
        for (int r = 1; r < ranks; r++) add_block(acc, src[r] + at * es, m, dtype);
        store_block(dst + at * es, acc, m, dtype);
    }
}

/* ---- balanced shards: the first count % ranks members hold one element more --------------------------------------- */

static size_t shard_start(size_t count, int ranks, int rank) {
    size_t base = count / ranks, extra = count % ranks;
    return base * rank + ((size_t)rank < extra ? (size_t)rank : extra);
}

static size_t shard_size(size_t count, int ranks, int rank) {
    return count / ranks + ((size_t)rank < count % ranks);
}

/* Elements of piece t of a shard when pieces hold up to `piece`. */
static size_t piece_size(size_t shard, size_t piece, size_t t) {
    size_t start = t * piece;
    return start >= shard ? 0 : shard - start < piece ? shard - start : piece;
}

static size_t pieces_of(size_t shard, size_t piece) { return (shard + piece - 1) / piece; }

/* ---- collectives -------------------------------------------------------------------------------------------------- */

/* One-shot: everybody publishes the whole message and sums it all. count elements must fit a slot. */
static int all_reduce_one_shot(context *c, const char *x, char *out, size_t count, int dtype) {
    const char *src[MAX_RANKS];
    size_t bytes = count * element_size(dtype);
    uint32_t stage = c->stage + 1;
    memcpy(slot(c, c->rank, stage), x, bytes);
    int result = meet(c, stage, make_note(OP_ALL_REDUCE, dtype, bytes));
    if (result != OK) return result;
    for (int r = 0; r < c->ranks; r++) src[r] = r == c->rank ? x : slot(c, r, stage);
    sum(out, src, c->ranks, count, dtype);
    return OK;
}

/* Two-shot: member r sums shard r, then everybody collects the sums. Long messages go in pieces, and stage t carries the
 * inputs of piece t together with the sums of piece t - 1, so a message of K pieces takes K + 1 stages.
 * A slot is divided into ranks regions of inputs and one of sums. */
static int all_reduce_two_shot(context *c, const char *x, char *out, size_t count, int dtype) {
    const char *src[MAX_RANKS];
    size_t es = element_size(dtype);
    int P = c->ranks, me = c->rank;
    size_t region = c->capacity / (size_t)(P + 1) / 64 * 64, piece = region / es;
    size_t pieces = pieces_of(shard_size(count, P, 0), piece);
    uint64_t note = make_note(OP_ALL_REDUCE, dtype, count * es);
    size_t own = shard_size(count, P, me), own_start = shard_start(count, P, me);
    for (size_t t = 0; t <= pieces; t++) {
        uint32_t stage = c->stage + 1;
        char *mine = slot(c, me, stage);
        if (t < pieces)
            for (int j = 0; j < P; j++)
                if (j != me)
                    memcpy(mine + j * region, x + (shard_start(count, P, j) + t * piece) * es,
                           piece_size(shard_size(count, P, j), piece, t) * es);
        int result = meet(c, stage, note);
        if (result != OK) return result;
        if (t > 0)
            for (int j = 0; j < P; j++)
                if (j != me)
                    memcpy(out + (shard_start(count, P, j) + (t - 1) * piece) * es, slot(c, j, stage) + P * region,
                           piece_size(shard_size(count, P, j), piece, t - 1) * es);
        if (t < pieces) {
            /* Straight into the slot of the next stage: everybody has published this one, so the last reads of that
             * parity are over. */
            size_t n = piece_size(own, piece, t);
            char *result_at = out + (own_start + t * piece) * es;
            for (int r = 0; r < P; r++)
                src[r] = r == me ? x + (own_start + t * piece) * es : slot(c, r, stage) + me * region;
            sum(result_at, src, P, n, dtype);
            memcpy(slot(c, me, stage + 1) + P * region, result_at, n * es);
        }
    }
    return OK;
}

/* out = sum over members of x; count elements; out is x or does not overlap it. one_shot_bytes: largest message that is
 * summed by everybody; the same on all members. */
int yalis_shm_all_reduce(context *c, const void *x, void *out, size_t count, int dtype, size_t one_shot_bytes) {
    size_t bytes = count * element_size(dtype);
    if (bytes <= one_shot_bytes && bytes <= c->capacity) return all_reduce_one_shot(c, x, out, count, dtype);
    return all_reduce_two_shot(c, x, out, count, dtype);
}

/* out = this member's balanced shard of the sum. out may be that shard within x. */
int yalis_shm_reduce_scatter(context *c, const void *x_, void *out_, size_t count, int dtype) {
    const char *x = x_;
    char *out = out_;
    const char *src[MAX_RANKS];
    size_t es = element_size(dtype);
    int P = c->ranks, me = c->rank;
    size_t region = c->capacity / (size_t)P / 64 * 64, piece = region / es;
    size_t pieces = pieces_of(shard_size(count, P, 0), piece);
    size_t own = shard_size(count, P, me), own_start = shard_start(count, P, me);
    uint64_t note = make_note(OP_REDUCE_SCATTER, dtype, count * es);
    for (size_t t = 0; t < pieces; t++) {
        uint32_t stage = c->stage + 1;
        char *mine = slot(c, me, stage);
        for (int j = 0; j < P; j++)
            if (j != me)
                memcpy(mine + j * region, x + (shard_start(count, P, j) + t * piece) * es,
                       piece_size(shard_size(count, P, j), piece, t) * es);
        int result = meet(c, stage, note);
        if (result != OK) return result;
        for (int r = 0; r < P; r++)
            src[r] = r == me ? x + (own_start + t * piece) * es : slot(c, r, stage) + me * region;
        sum(out + t * piece * es, src, P, piece_size(own, piece, t), dtype);
    }
    return OK;
}

/* out = the balanced shards of count elements of `size` bytes, this member's own given as x (or already in place). */
int yalis_shm_all_gather(context *c, const void *x_, void *out_, size_t count, size_t size) {
    const char *x = x_;
    char *out = out_;
    int P = c->ranks, me = c->rank;
    size_t piece = c->capacity / size;
    size_t pieces = pieces_of(shard_size(count, P, 0), piece);
    size_t own = shard_size(count, P, me), own_start = shard_start(count, P, me);
    uint64_t note = make_note(OP_ALL_GATHER, (int)size, count * size);
    if (x != out + own_start * size) memcpy(out + own_start * size, x, own * size);
    for (size_t t = 0; t < pieces; t++) {
        uint32_t stage = c->stage + 1;
        memcpy(slot(c, me, stage), x + t * piece * size, piece_size(own, piece, t) * size);
        int result = meet(c, stage, note);
        if (result != OK) return result;
        for (int j = 0; j < P; j++)
            if (j != me)
                memcpy(out + (shard_start(count, P, j) + t * piece) * size, slot(c, j, stage),
                       piece_size(shard_size(count, P, j), piece, t) * size);
    }
    return OK;
}

/* Copy member root's x into everybody's x. */
int yalis_shm_broadcast(context *c, void *x_, size_t bytes, int root) {
    char *x = x_;
    uint64_t note = make_note(OP_BROADCAST, root, bytes);
    for (size_t at = 0; at < bytes; at += c->capacity) {
        size_t n = bytes - at < c->capacity ? bytes - at : c->capacity;
        uint32_t stage = c->stage + 1;
        if (c->rank == root) memcpy(slot(c, root, stage), x + at, n);
        int result = meet(c, stage, note);
        if (result != OK) return result;
        if (c->rank != root) memcpy(x + at, slot(c, root, stage), n);
    }
    return OK;
}

int yalis_shm_barrier(context *c) { return meet(c, c->stage + 1, make_note(OP_BARRIER, 0, 0)); }
