/* y = x W^T (+ bias) for weights packed in panels, and lookups of single weight rows. */
#include "simd.h"

DEFINE_TILES(bf16, stream)
DEFINE_TILES(f32, stream)

/* Rows of one task. Long inputs are cut so that several threads find work even where there are few panels; the cut
 * does not touch any sum. */
#define ROWS_PER_TASK 240
/* Units of B that all tiles of a task visit before the next stretch: 16 KiB, so that tiles after the first read L1 while
 * the following stretch arrives from memory. Accumulators wait in memory in between, unrounded. Against whole panels this
 * is worth 1.6x at 8 rows and 1.2x at 32; half or twice as much is slower. */
#define STRETCH_UNITS 64

static long unit_count(long k, int is_bf16) { return is_bf16 ? (k + 1) / 2 : k; }

/* One panel (64 columns) for `rows` rows of x. gate: NULL, or [rows][64] rounded sums g; silu(g) * sum is stored then. */
static inline __attribute__((always_inline)) void panel_task(const char *x, long ldx, const uint32_t *panel,
                                                             const float *bias, const char *gate, char *out, long ldo,
                                                             long rows, long columns, long k, int is_bf16) {
    const long gate_row = PANEL * (is_bf16 ? 2 : 4);
    const long whole = is_bf16 ? k / 2 : k; /* units that lie wholly inside a row of x */
    const long tile_count = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const tile_fn *ahead = is_bf16 ? tiles_bf16_ahead : tiles_f32_ahead;
    const tile_fn *tiles = tile_count > 1 ? ahead : is_bf16 ? tiles_bf16_stream : tiles_f32_stream;
    float acc[ROWS_PER_TASK * PANEL] __attribute__((aligned(64)));
    long u = 0;
    do { /* at least once: k = 1 in bf16 has no whole unit */
        const long units = tile_count == 1 || whole - u < STRETCH_UNITS ? whole - u : STRETCH_UNITS;
        const int only = u == 0 && units == whole, last = u + units == whole;
        const uint32_t *b = panel + u * PANEL;
        for (long t = 0; t < tile_count; t++) { /* tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2 */
            const long first = rows * t / tile_count, n = rows * (t + 1) / tile_count - first;
            float *c = only ? acc : acc + first * PANEL;
            const char *a = x + first * ldx;
            tiles[n](a + u * 4, ldx, b, units, c, PANEL, u > 0, t < 2 ? b + units * PANEL + t * units * PANEL / 2 : b);
            if (!last) continue;
            if (is_bf16 && (k & 1)) {
                uint32_t tail[TILE_ROWS];
                for (long r = 0; r < n; r++) tail[r] = *(const half_t *)(a + r * ldx + (k - 1) * 2);
                ahead[n](tail, 4, panel + whole * PANEL, 1, c, PANEL, 1, b);
            }
            for (long r = 0; r < n; r++)
                for (long i = 0; i < columns; i += 16) {
                    __m512 v = _mm512_load_ps(c + r * PANEL + i);
                    if (bias) v = _mm512_add_ps(v, _mm512_loadu_ps(bias + i));
                    if (gate) {
                        if (is_bf16) v = round_bf16(v);
                        v = silu_mul(load16(gate + (first + r) * gate_row, i, 0xffff, is_bf16), v, is_bf16);
                    }
                    store16(out + (first + r) * ldo, i, first_lanes(columns - i), v, is_bf16);
                }
        }
        u += units;
    } while (u < whole);
}

static inline __attribute__((always_inline)) void linear(const char *x, long ldx, const uint32_t *w, const float *bias,
                                                         char *out, long ldo, long rows, long n, long k, long threads,
                                                         int is_bf16) {
    const long size = is_bf16 ? 2 : 4, units = unit_count(k, is_bf16);
    const long panels = (n + PANEL - 1) / PANEL, chunks = (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
    const long tasks = panels * chunks;
    if (threads > tasks) threads = tasks;
#define RUN_TASK(i)                                                                                      \
    {                                                                                                    \
        long p = (i) / chunks, row = rows * ((i) % chunks) / chunks, end = rows * ((i) % chunks + 1) / chunks; \
        panel_task(x + row * ldx, ldx, w + p * units * PANEL, bias ? bias + p * PANEL : 0, 0,            \
                   out + row * ldo + p * PANEL * size, ldo, end - row,                                   \
                   n - p * PANEL < PANEL ? n - p * PANEL : PANEL, k, is_bf16);                           \
    }
    if (threads <= 1) {
        for (long i = 0; i < tasks; i++) RUN_TASK(i)
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long i = 0; i < tasks; i++) RUN_TASK(i)
    }
}

/* ldx, ldo in bytes; bias: fp32, padded to whole panels, or NULL. */
void yalis_linear_bf16(const void *x, long ldx, const void *w, const void *bias, void *out, long ldo, long rows,
                       long n, long k, long threads) {
    linear(x, ldx, w, bias, out, ldo, rows, n, k, threads, 1);
}

void yalis_linear_f32(const void *x, long ldx, const void *w, const void *bias, void *out, long ldo, long rows, long n,
                      long k, long threads) {
    linear(x, ldx, w, bias, out, ldo, rows, n, k, threads, 0);
}

/* out[rows][n / 2] = silu(gate) * up where x W^T = (gate | up); n / 2 must be whole panels. The sums of gate never leave
 * the core. */
static inline __attribute__((always_inline)) void linear_silu(const char *x, long ldx, const uint32_t *w,
                                                              const float *bias, char *out, long ldo, long rows,
                                                              long n, long k, long threads, int is_bf16) {
    const long size = is_bf16 ? 2 : 4, units = unit_count(k, is_bf16), panel = units * PANEL;
    const long panels = n / 2 / PANEL, chunks = (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, tasks = panels * chunks;
    if (threads > tasks) threads = tasks;
#define RUN_GATED_TASK(i)                                                                                \
    {                                                                                                    \
        char gate[ROWS_PER_TASK * PANEL * 4] __attribute__((aligned(64)));                               \
        long p = (i) / chunks, row = rows * ((i) % chunks) / chunks, end = rows * ((i) % chunks + 1) / chunks; \
        long q = p + panels;                                                                             \
        panel_task(x + row * ldx, ldx, w + p * panel, bias ? bias + p * PANEL : 0, 0, gate, PANEL * size, end - row, \
                   PANEL, k, is_bf16);                                                                   \
        panel_task(x + row * ldx, ldx, w + q * panel, bias ? bias + q * PANEL : 0, gate,                 \
                   out + row * ldo + p * PANEL * size, ldo, end - row, PANEL, k, is_bf16);               \
    }
    if (threads <= 1) {
        for (long i = 0; i < tasks; i++) RUN_GATED_TASK(i)
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long i = 0; i < tasks; i++) RUN_GATED_TASK(i)
    }
}

void yalis_linear_silu_bf16(const void *x, long ldx, const void *w, const void *bias, void *out, long ldo, long rows,
                            long n, long k, long threads) {
    linear_silu(x, ldx, w, bias, out, ldo, rows, n, k, threads, 1);
}

void yalis_linear_silu_f32(const void *x, long ldx, const void *w, const void *bias, void *out, long ldo, long rows,
                           long n, long k, long threads) {
    linear_silu(x, ldx, w, bias, out, ldo, rows, n, k, threads, 0);
}

/* Pack W[n][k] (row stride ldw bytes) into panels [ceil(n/64)][units][64], zero-padded. */
void yalis_pack(const void *w, long ldw, void *packed, long n, long k, long is_bf16, long threads) {
    const long units = unit_count(k, is_bf16), panels = (n + PANEL - 1) / PANEL, whole = is_bf16 ? k / 2 : k;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < panels; p++) {
        const unit_t *rows[PANEL];
        uint32_t *panel = (uint32_t *)packed + p * units * PANEL;
        const long columns = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
        /* Columns past n: any readable row, overwritten by zeros below. */
        for (long c = 0; c < PANEL; c++)
            rows[c] = (const unit_t *)((const char *)w + (p * PANEL + (c < columns ? c : 0)) * ldw);
        pack_columns(panel, rows, PANEL, whole);
        if (whole < units)
            for (long c = 0; c < PANEL; c++)
                panel[whole * PANEL + c] = *(const half_t *)((const char *)rows[c] + (k - 1) * 2);
        if (columns < PANEL)
            for (long u = 0; u < units; u++) memset(panel + u * PANEL + columns, 0, (PANEL - columns) * 4);
    }
}

/* out[i] = row ids[i] of the packed W; ids outside [0, n) give zeros (vocabulary shards rely on it). */
void yalis_unpack_rows(const void *packed, const int64_t *ids, void *out, long ldo, long count, long n, long k,
                       long is_bf16, long threads) {
    const long units = unit_count(k, is_bf16), whole = is_bf16 ? k / 2 : k, size = is_bf16 ? 2 : 4;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count > 1)
    for (long i = 0; i < count; i++) {
        char *o = (char *)out + i * ldo;
        if (ids[i] < 0 || ids[i] >= n) {
            memset(o, 0, k * size);
            continue;
        }
        const uint32_t *column = (const uint32_t *)packed + ids[i] / PANEL * units * PANEL + ids[i] % PANEL;
        for (long u = 0; u < whole; u++) ((unit_t *)o)[u] = column[u * PANEL];
        if (whole < units) *(half_t *)(o + (k - 1) * 2) = (uint16_t)column[whole * PANEL];
    }
}
