/* Causal attention over paged keys and values, for ragged batches of prefill chunks and decodes.
 *
 * A task is (sequence, kv head, tile of query positions); its rows are the tile's positions times the query heads that
 * share the kv head. Keys are visited in tiles of 64 that start at absolute positions 0, 64, 128, ... whatever the
 * chunking, and decode runs the same arithmetic as prefill; a key tile that a row cannot see multiplies its state by
 * exactly 1 and adds exactly 0. A row's result is therefore bitwise the same in any batch and for any chunking.
 */
#include "simd.h"

#define KEYS 64       /* keys per tile = columns of a panel */
#define MAX_ROWS 64   /* query rows per task, at most */
#define AIM_ROWS 48   /* query rows per task that a prefill aims at */
#define MAX_HEAD 256  /* head dimension, at most */

typedef struct {
    const char *q, *k_cache, *v_cache;
    char *out;
    const int32_t *query_start, *seq_lens, *block_table;
    long q_row, q_head, o_row, o_head; /* bytes */
    long table_row;                    /* entries */
    long batch, hq, hk, d, block_size, window;
    float scale_log2;
} attention_t;

typedef struct {
    uint32_t k[MAX_HEAD * KEYS];            /* [units of d][64 keys] */
    uint32_t v[MAX_HEAD * KEYS];            /* [d / 64][units of keys][64] */
    char q[MAX_ROWS * MAX_HEAD * 4];        /* [rows][d] */
    float s[MAX_ROWS * KEYS];               /* scores */
    char p[MAX_ROWS * KEYS * 4];            /* probabilities, in the dtype of v */
    float o[MAX_ROWS * MAX_HEAD];           /* [rows][d padded to 64] */
    float m[MAX_ROWS], l[MAX_ROWS];         /* running maximum (log2 domain) and sum */
} __attribute__((aligned(64))) scratch_t;

/* The rows of one key tile, first and last position that the task may see in it. */
typedef struct {
    const unit_t *k[KEYS], *v[KEYS];
    long keys; /* up to the last visible position */
} key_tile_t;

static const char zero_row[MAX_HEAD * 4] __attribute__((aligned(64)));

/* Find the keys t0 .. t0+63; slots outside [begin, end) may hold anything, NaN too, and are replaced by zeros. */
static inline void find_keys(const attention_t *a, key_tile_t *t, const int32_t *table, long h, long head_bytes, long t0,
                             long begin, long end) {
    long block = t0 / a->block_size, offset = t0 % a->block_size;
    const long stride = a->hk * a->block_size;
    t->keys = end - t0 < KEYS ? end - t0 : KEYS;
    for (long j = 0; j < KEYS; j++) {
        t->k[j] = t->v[j] = (const unit_t *)zero_row;
        if (j < t->keys && t0 + j >= begin) {
            long at = (table[block] * stride + h * a->block_size + offset) * head_bytes;
            t->k[j] = (const unit_t *)(a->k_cache + at), t->v[j] = (const unit_t *)(a->v_cache + at);
        }
        if (++offset == a->block_size) offset = 0, block++;
    }
}

/* Load one word of every line of a key tile, in order of address. Real loads, since they start the hardware's stream
 * prefetch; prefetch instructions, or the strided loads of the packing alone, leave decode at two thirds of this speed. */
static inline void touch_keys(const key_tile_t *t, long bytes) {
    for (long j = 0; j < t->keys; j++)
        for (long i = 0; i < bytes; i += 64) (void)*(const volatile char *)((const char *)t->k[j] + i);
    for (long j = 0; j < t->keys; j++)
        for (long i = 0; i < bytes; i += 64) (void)*(const volatile char *)((const char *)t->v[j] + i);
}

/* Interleave keys 2j and 2j+1 (bf16) or copy each key (fp32) of 16 keys into panels of 64 columns; `v` points at the
 * first of their units in the first panel, panels are `stride` units apart. */
static inline __attribute__((always_inline)) void pack_values(uint32_t *v, const unit_t *const *rows, long d, long stride,
                                                              int is_bf16) {
    if (!is_bf16) {
        for (long u = 0; u < 16; u++)
            for (long c = 0; c < d; c += 16)
                _mm512_store_si512(v + (c / PANEL * stride + u) * PANEL + c % PANEL,
                                   _mm512_maskz_loadu_epi32(first_lanes(d - c), rows[u] + c));
        return;
    }
    static const uint16_t low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i lo = _mm512_loadu_si512(low), hi = _mm512_add_epi16(lo, _mm512_set1_epi16(16));
    for (long c = 0; c < d; c += 32) {
        const __mmask32 m = d - c >= 32 ? 0xffffffffu : (1u << (d - c)) - 1;
        uint32_t *to = v + c / PANEL * stride * PANEL + c % PANEL;
        for (long u = 0; u < 8; u++) {
            __m512i x = _mm512_maskz_loadu_epi16(m, (const half_t *)rows[2 * u] + c);
            __m512i y = _mm512_maskz_loadu_epi16(m, (const half_t *)rows[2 * u + 1] + c);
            _mm512_store_si512(to + u * PANEL, _mm512_permutex2var_epi16(x, lo, y));
            _mm512_store_si512(to + u * PANEL + 16, _mm512_permutex2var_epi16(x, hi, y));
        }
    }
}

/* Softmax step of one row over one key tile: lanes [lo, hi) are visible. Returns the factor for the row's old state. */
static inline __attribute__((always_inline)) float softmax_row(const float *s, char *p, float *m, float *l, long lo,
                                                               long hi, float scale, int is_bf16) {
    __m512 x[4], top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    __mmask16 seen[4];
    for (int i = 0; i < 4; i++) {
        seen[i] = first_lanes(hi - 16 * i) & (__mmask16)~first_lanes(lo - 16 * i);
        x[i] = _mm512_mul_ps(_mm512_load_ps(s + 16 * i), _mm512_set1_ps(scale));
        top = _mm512_mask_max_ps(top, seen[i], top, x[i]);
    }
    const float tile_m = _mm512_reduce_max_ps(top), old_m = *m, new_m = tile_m > old_m ? tile_m : old_m;
    for (int i = 0; i < 4; i++) {
        __m512 e = exp2_masked(seen[i], _mm512_sub_ps(x[i], _mm512_set1_ps(new_m)));
        if (is_bf16) { /* the sum takes the rounded values: the weights that meet V then add up to one */
            __m256i h = (__m256i)_mm512_cvtneps_pbh(e);
            _mm256_store_si256((__m256i *)(p + 32 * i), h);
            e = bf16_to_f32(h);
        } else
            _mm512_store_ps((float *)(p + 64 * i), e);
        sum = _mm512_add_ps(sum, e);
    }
    float factor = 1.0f;
    if (new_m > old_m) {
        factor = _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(old_m - new_m)));
        *m = new_m;
    }
    *l = *l * factor + _mm512_reduce_add_ps(sum);
    return factor;
}

static inline __attribute__((always_inline)) void attend(const attention_t *a, scratch_t *w, long b, long h, long first,
                                                         long positions, int is_bf16) {
    const long size = is_bf16 ? 2 : 4, group = a->hq / a->hk, rows = positions * group, d = a->d;
    const long head_bytes = d * size, units = is_bf16 ? d / 2 : d, d_pad = (d + PANEL - 1) / PANEL * PANEL;
    const long p_bytes = KEYS * size, v_units = is_bf16 ? KEYS / 2 : KEYS; /* per panel of a key tile */
    const long start = a->query_start[b], length = a->seq_lens[b];
    const long base = length - (a->query_start[b + 1] - start) + first; /* absolute position of the first row */
    const tile_fn *tiles = is_bf16 ? tiles_bf16_ahead : tiles_f32_ahead;
    const int32_t *table = a->block_table + b * a->table_row;
    for (long r = 0; r < rows; r++) {
        const char *q = a->q + (start + first + r / group) * a->q_row + (h * group + r % group) * a->q_head;
        memcpy(w->q + r * head_bytes, q, head_bytes);
        w->m[r] = -INFINITY, w->l[r] = 0.0f;
    }
    memset(w->o, 0, rows * d_pad * sizeof(float));
    const long end = base + positions;                                                   /* of the last row's keys */
    const long begin = a->window && base - a->window + 1 > 0 ? base - a->window + 1 : 0; /* of the first row's keys */
    const int touch = rows <= 2 * TILE_ROWS; /* many rows compute longer on a tile than it takes to arrive */
    key_tile_t found[2];
    long t0 = begin / KEYS * KEYS;
    find_keys(a, &found[0], table, h, head_bytes, t0, begin, end);
    if (touch) touch_keys(&found[0], head_bytes);
    for (int turn = 0; t0 < end; t0 += KEYS, turn ^= 1) {
        const key_tile_t *now = &found[turn];
        if (t0 + KEYS < end) {
            find_keys(a, &found[turn ^ 1], table, h, head_bytes, t0 + KEYS, begin, end);
            if (touch) touch_keys(&found[turn ^ 1], head_bytes);
        }
        /* Only groups that hold a visible key: scores of the others are masked, their values are not multiplied. */
        for (long j = 0; j < now->keys; j += 16) pack_columns(w->k + j, now->k + j, 16, units);
        for (long r = 0; r < rows; r += TILE_ROWS) {
            long n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
            tiles[n](w->q + r * head_bytes, head_bytes, w->k, units, w->s + r * KEYS, KEYS, 0, w->k);
        }
        for (long j = 0; j < now->keys; j += 16)
            pack_values(w->v + j * size / 4 * PANEL, now->v + j, d, v_units, is_bf16);
        const long key_units = (now->keys * size + 3) / 4;
        for (long r = 0; r < rows; r++) {
            long position = base + r / group, hi = position + 1 - t0, lo = a->window ? position - a->window + 1 - t0 : 0;
            char *p = w->p + r * p_bytes;
            if (hi > KEYS) hi = KEYS;
            if (lo < 0) lo = 0;
            if (lo >= hi) { /* this row sees nothing here */
                memset(p, 0, p_bytes);
                continue;
            }
            float factor = softmax_row(w->s + r * KEYS, p, w->m + r, w->l + r, lo, hi, a->scale_log2, is_bf16);
            if (factor != 1.0f)
                for (long c = 0; c < d_pad; c += 16) {
                    float *o = w->o + r * d_pad + c;
                    _mm512_store_ps(o, _mm512_mul_ps(_mm512_load_ps(o), _mm512_set1_ps(factor)));
                }
        }
        for (long c = 0; c < d_pad; c += PANEL)
            for (long r = 0; r < rows; r += TILE_ROWS) {
                long n = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
                tiles[n](w->p + r * p_bytes, p_bytes, w->v + c * v_units, key_units, w->o + r * d_pad + c, d_pad, 1, w->v);
            }
    }
    for (long r = 0; r < rows; r++) {
        char *o = a->out + (start + first + r / group) * a->o_row + (h * group + r % group) * a->o_head;
        __m512 l = _mm512_set1_ps(w->l[r]);
        for (long c = 0; c < d; c += 16)
            store16(o, c, first_lanes(d - c), _mm512_div_ps(_mm512_load_ps(w->o + r * d_pad + c), l), is_bf16);
    }
}

static void attend_bf16(const attention_t *a, scratch_t *w, long b, long h, long first, long n) {
    attend(a, w, b, h, first, n, 1);
}
static void attend_f32(const attention_t *a, scratch_t *w, long b, long h, long first, long n) {
    attend(a, w, b, h, first, n, 0);
}

/* One task number -> (sequence, first position of the tile, kv head); the longest tiles of a sequence come first. */
static void run_task(const attention_t *a, long task, long tile, long is_bf16, scratch_t *w) {
    long b = 0, tiles = 0, queries = 0;
    for (;; b++) {
        queries = a->query_start[b + 1] - a->query_start[b];
        tiles = (queries + tile - 1) / tile;
        if (task < tiles * a->hk) break;
        task -= tiles * a->hk;
    }
    long first = (tiles - 1 - task / a->hk) * tile, n = queries - first < tile ? queries - first : tile;
    (is_bf16 ? attend_bf16 : attend_f32)(a, w, b, task % a->hk, first, n);
}

/* First sequence whose lengths or visible block numbers do not fit, or -1. A scan of the table costs far less than the
 * keys behind it, and keeps a bad number from reading foreign memory. */
static long first_misfit(const attention_t *a, long rows, long blocks) {
    for (long b = 0; b < a->batch; b++) {
        long start = a->query_start[b], end = a->query_start[b + 1], length = a->seq_lens[b];
        if ((b == 0 && start != 0) || end < start || end > rows || length < end - start) return b;
        if (length > a->table_row * a->block_size) return b;
        if (start == end) continue;
        long begin = a->window ? length - (end - start) - a->window + 1 : 0;
        const int32_t *table = a->block_table + b * a->table_row;
        for (long i = (begin > 0 ? begin : 0) / a->block_size; i * a->block_size < length; i++)
            if (table[i] < 0 || table[i] >= blocks) return b;
    }
    return a->batch && a->query_start[a->batch] != rows ? a->batch - 1 : -1;
}

/* q[rows][hq][d] -> out[rows][hq][d] (strides in bytes); caches [blocks][hk][block_size][d] contiguous; window 0 = none.
 * Rows query_start[b] .. query_start[b+1]-1 are the last rows of a sequence of seq_lens[b] keys.
 * Returns -1, or the sequence that does not fit (nothing is then computed). */
long yalis_paged_attention(const void *q, long q_row, long q_head, const void *k_cache, const void *v_cache, void *out,
                           long o_row, long o_head, const int32_t *query_start, const int32_t *seq_lens,
                           const int32_t *block_table, long table_row, long batch, long rows, long blocks, long hq,
                           long hk, long d, long block_size, long window, float scale, long is_bf16, long threads) {
    attention_t a = {q,  k_cache, v_cache, out, query_start, seq_lens, block_table, q_row, q_head, o_row, o_head,
                     table_row, batch, hq, hk, d, block_size, window, scale * 1.44269504f};
    long misfit = first_misfit(&a, rows, blocks);
    if (misfit >= 0) return misfit;
    long group = hq / hk, tile = AIM_ROWS / group > 0 ? AIM_ROWS / group : 1, tasks = 0;
    for (long b = 0; b < batch; b++) tasks += (query_start[b + 1] - query_start[b] + tile - 1) / tile * hk;
    if (threads > tasks) threads = tasks;
    if (threads <= 1) {
        scratch_t w;
        for (long i = 0; i < tasks; i++) run_task(&a, i, tile, is_bf16, &w);
        return -1;
    }
#pragma omp parallel num_threads(threads)
    {
        scratch_t w;
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < tasks; i++) run_task(&a, i, tile, is_bf16, &w);
    }
    return -1;
}
