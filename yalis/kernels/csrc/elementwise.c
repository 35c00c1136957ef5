/* Norms, activation, rotary embedding and cache writes: the row-wise operations between the matrix products.
 *
 * Roundings follow transformers' Llama in the model's dtype, step by step, so that greedy tokens agree.
 */
#include "simd.h"

/* Below this many elements a second thread costs more than it saves (a fork and join is 1 to 2 us). */
#define PARALLEL_ELEMENTS 32768
#define WORKERS(elements) ((elements) < PARALLEL_ELEMENTS ? 1 : threads)

static inline __attribute__((always_inline)) void norm_row(const char *x, char *residual, const char *weight,
                                                           char *out, long h, float eps, int is_bf16) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < h; i += 16) {
        __mmask16 m = first_lanes(h - i);
        __m512 v = load16(x, i, m, is_bf16);
        if (residual) {
            v = _mm512_add_ps(v, load16(residual, i, m, is_bf16));
            if (is_bf16) v = round_bf16(v);
            store16(residual, i, m, v, is_bf16);
        }
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)h + eps));
    const char *source = residual ? residual : x;
    for (long i = 0; i < h; i += 16) {
        __mmask16 m = first_lanes(h - i);
        __m512 v = _mm512_mul_ps(load16(source, i, m, is_bf16), scale);
        if (is_bf16) v = round_bf16(v);
        store16(out, i, m, _mm512_mul_ps(v, load16(weight, i, m, is_bf16)), is_bf16);
    }
}

/* Rows are indexed (outer, inner); strides in bytes. residual: NULL, or [outer] rows updated to x + residual. */
void yalis_rms_norm(const void *x, long x_outer, long x_inner, void *residual, long r_outer, const void *weight,
                    void *out, long o_outer, long o_inner, long outer, long inner, long h, float eps, long is_bf16,
                    long threads) {
#define NORM_ROW(i)                                                                                      \
    {                                                                                                    \
        long a = (i) / inner, b = (i) % inner;                                                           \
        const char *xr = (const char *)x + a * x_outer + b * x_inner;                                    \
        char *rr = residual ? (char *)residual + a * r_outer : 0;                                        \
        char *orow = (char *)out + a * o_outer + b * o_inner;                                            \
        if (is_bf16)                                                                                     \
            norm_row(xr, rr, weight, orow, h, eps, 1);                                                   \
        else                                                                                             \
            norm_row(xr, rr, weight, orow, h, eps, 0);                                                   \
    }
    if (WORKERS(outer * inner * h) <= 1) {
        for (long i = 0; i < outer * inner; i++) NORM_ROW(i)
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long i = 0; i < outer * inner; i++) NORM_ROW(i)
    }
}

static inline __attribute__((always_inline)) void silu_row(const char *gate, const char *up, char *out, long n,
                                                           int is_bf16) {
    for (long i = 0; i < n; i += 16) {
        __mmask16 m = first_lanes(n - i);
        store16(out, i, m, silu_mul(load16(gate, i, m, is_bf16), load16(up, i, m, is_bf16), is_bf16), is_bf16);
    }
}

/* gate_up[rows][2 n] -> out[rows][n]; strides in bytes. */
void yalis_silu_and_mul(const void *gate_up, long ldx, void *out, long ldo, long rows, long n, long is_bf16,
                        long threads) {
#define SILU_ROW(i)                                                                                      \
    {                                                                                                    \
        const char *g = (const char *)gate_up + (i)*ldx;                                                 \
        char *o = (char *)out + (i)*ldo;                                                                 \
        if (is_bf16)                                                                                     \
            silu_row(g, g + n * 2, o, n, 1);                                                             \
        else                                                                                             \
            silu_row(g, g + n * 4, o, n, 0);                                                             \
    }
    if (WORKERS(rows * n) <= 1) {
        for (long i = 0; i < rows; i++) SILU_ROW(i)
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long i = 0; i < rows; i++) SILU_ROW(i)
    }
}

/* Rotate one head in place: (a, b) halves -> (a cos - b sin, b cos + a sin), each product rounded to the dtype. */
static inline __attribute__((always_inline)) void rope_head(char *x, const float *cosine, const float *sine, long half,
                                                            int is_bf16) {
    char *y = x + half * (is_bf16 ? 2 : 4);
    for (long i = 0; i < half; i += 16) {
        __mmask16 m = first_lanes(half - i);
        __m512 c = _mm512_maskz_loadu_ps(m, cosine + i), s = _mm512_maskz_loadu_ps(m, sine + i);
        __m512 a = load16(x, i, m, is_bf16), b = load16(y, i, m, is_bf16);
        if (is_bf16) c = round_bf16(c), s = round_bf16(s);
        __m512 ac = _mm512_mul_ps(a, c), bs = _mm512_mul_ps(b, s), bc = _mm512_mul_ps(b, c), as = _mm512_mul_ps(a, s);
        if (is_bf16) ac = round_bf16(ac), bs = round_bf16(bs), bc = round_bf16(bc), as = round_bf16(as);
        store16(x, i, m, _mm512_sub_ps(ac, bs), is_bf16);
        store16(y, i, m, _mm512_add_ps(bc, as), is_bf16);
    }
}

/* q[t][hq][d] and k[t][hk][d] in place; strides in bytes; cos_sin[max_pos][d] fp32, cosines first.
 * Returns the first row whose position lies outside the table (nothing is then changed), or -1. */
long yalis_rope(void *q, long q_row, long q_head, void *k, long k_row, long k_head, const int64_t *positions,
                const float *cos_sin, long max_pos, long rows, long hq, long hk, long d, long is_bf16, long threads) {
    for (long t = 0; t < rows; t++)
        if (positions[t] < 0 || positions[t] >= max_pos) return t;
#define ROPE_ROW(t)                                                                                      \
    {                                                                                                    \
        const float *table = cos_sin + positions[t] * d;                                                 \
        for (long h = 0; h < hq + hk; h++) {                                                             \
            char *x = h < hq ? (char *)q + (t)*q_row + h * q_head : (char *)k + (t)*k_row + (h - hq) * k_head; \
            if (is_bf16)                                                                                 \
                rope_head(x, table, table + d / 2, d / 2, 1);                                            \
            else                                                                                         \
                rope_head(x, table, table + d / 2, d / 2, 0);                                            \
        }                                                                                                \
    }
    if (WORKERS(rows * (hq + hk) * d) <= 1) {
        for (long t = 0; t < rows; t++) ROPE_ROW(t)
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (long t = 0; t < rows; t++) ROPE_ROW(t)
    }
    return -1;
}

/* Copy k, v rows into pages [block][hk][block_size][d]; a negative slot skips its row. `bytes` = bytes of one head.
 * Returns the first row whose slot lies outside the cache (nothing is then written), or -1. */
long yalis_write_kv(const void *k, long k_row, long k_head, const void *v, long v_row, long v_head, void *k_cache,
                    void *v_cache, const int64_t *slots, long rows, long hk, long blocks, long block_size, long bytes) {
    for (long t = 0; t < rows; t++)
        if (slots[t] >= blocks * block_size) return t;
    for (long t = 0; t < rows; t++) {
        if (slots[t] < 0) continue;
        long block = slots[t] / block_size, offset = slots[t] % block_size;
        for (long h = 0; h < hk; h++) {
            long at = ((block * hk + h) * block_size + offset) * bytes;
            memcpy((char *)k_cache + at, (const char *)k + t * k_row + h * k_head, bytes);
            memcpy((char *)v_cache + at, (const char *)v + t * v_row + h * v_head, bytes);
        }
    }
    return -1;
}
