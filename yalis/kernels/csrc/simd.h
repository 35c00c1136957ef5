/* Vector types, conversions and the register-tile kernel shared by all CPU kernels.
 *
 * Everything below works on "units" of 32 bits: one fp32 value, or a pair of neighbouring bf16 values. A matrix
 * operand B is packed as [units][64 columns] of units ("panel"); operand A is row-major and its units are broadcast.
 * Each output value is then owned by one vector lane that adds its products in ascending order of k and nothing else,
 * so a row's result cannot depend on the number of rows, its place among them, or the number of threads.
 */
#ifndef YALIS_SIMD_H
#define YALIS_SIMD_H

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PANEL 64    /* columns of a packed panel: four vectors of 16 lanes */
#define TILE_ROWS 6 /* 6 rows x 4 vectors = 24 accumulators, 4 vectors of B, 1 broadcast: fits 32 registers */

typedef uint32_t unit_t __attribute__((aligned(1), may_alias)); /* rows may start at any bf16 element */
typedef uint16_t half_t __attribute__((aligned(1), may_alias));
typedef float single_t __attribute__((aligned(1), may_alias));

static inline __m512 bf16_to_f32(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* Round to nearest even, by integer arithmetic. */
static inline __m256i f32_to_bf16_any(__m512 f) {
    __m512i u = _mm512_castps_si512(f);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}

/* The same by VCVTNEPS2BF16, a third of the instructions. It flushes denormals, which torch does not, and hands on what a
 * NaN carries: a vector that holds one of them takes the long way. */
static inline __m256i f32_to_bf16(__m512 f) {
    const int kNaN = 0x81, kDenormal = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask(f, kNaN | kDenormal) != 0, 0)) return f32_to_bf16_any(f);
    return (__m256i)_mm512_cvtneps_pbh(f);
}

/* Values rounded through bf16, still held as fp32. */
static inline __m512 round_bf16(__m512 f) { return bf16_to_f32(f32_to_bf16(f)); }

static inline __mmask16 first_lanes(long n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

/* Loads and stores of up to 16 elements as fp32; `is_bf16` is a constant after inlining. */
static inline __attribute__((always_inline)) __m512 load16(const void *p, long i, __mmask16 m, int is_bf16) {
    if (is_bf16) return bf16_to_f32(_mm256_maskz_loadu_epi16(m, (const half_t *)p + i));
    return _mm512_maskz_loadu_ps(m, (const single_t *)p + i);
}

static inline __attribute__((always_inline)) void store16(void *p, long i, __mmask16 m, __m512 v, int is_bf16) {
    if (is_bf16)
        _mm256_mask_storeu_epi16((half_t *)p + i, m, f32_to_bf16(v));
    else
        _mm512_mask_storeu_ps((single_t *)p + i, m, v);
}

/* 2^x in lanes `keep`, 0 in the others. Exactly 1 at 0, 0 at -inf, NaN at NaN; relative error below 2e-7. */
static inline __m512 exp2_masked(__mmask16 keep, __m512 x) {
    /* Beyond 2^-160 the result is 0 anyway; the bounds keep x - n free of inf - inf. The operand order keeps NaN. */
    x = _mm512_max_ps(_mm512_set1_ps(-160.0f), x);
    x = _mm512_min_ps(_mm512_set1_ps(160.0f), x);
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n);
    /* Taylor coefficients of 2^f = exp(f ln 2) on |f| <= 1/2. */
    __m512 p = _mm512_set1_ps(1.5252734e-5f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.5403530e-4f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(keep, p, n);
}

static inline __m512 exp2_ps(__m512 x) { return exp2_masked(0xffff, x); }

/* silu(gate) * up as transformers rounds it: silu in fp32, rounded to the dtype, then the product (not yet rounded). */
static inline __attribute__((always_inline)) __m512 silu_mul(__m512 gate, __m512 up, int is_bf16) {
    __m512 e = exp2_ps(_mm512_mul_ps(gate, _mm512_set1_ps(-1.44269504f)));
    __m512 s = _mm512_div_ps(gate, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
    if (is_bf16) s = round_bf16(s);
    return _mm512_mul_ps(s, up);
}

/* 16 x 16 transpose of units: v[i] lane j becomes v[j] lane i. */
static inline void transpose16(__m512i v[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* Pack `rows[0..n)` (row-major, `units` long; n a multiple of 16) as columns of a panel [units][64]. */
static inline void pack_columns(uint32_t *panel, const unit_t *const *rows, long n, long units) {
    for (long c = 0; c < n; c += 16)
        for (long u = 0; u < units; u += 16) {
            __mmask16 m = first_lanes(units - u);
            __m512i v[16];
            for (int i = 0; i < 16; i++) v[i] = _mm512_maskz_loadu_epi32(m, rows[c + i] + u);
            transpose16(v);
            long count = units - u < 16 ? units - u : 16;
            for (long i = 0; i < count; i++) _mm512_store_si512(panel + (u + i) * PANEL + c, v[i]);
        }
}

/* C[rows][64] (+)= A[rows][units] * B[units][64], fp32 accumulators; `accumulate` continues from C.
 * Named accumulators, not arrays: the compiler must keep all 24 in registers. */
#define FOR_ROWS_1(X) X(0)
#define FOR_ROWS_2(X) FOR_ROWS_1(X) X(1)
#define FOR_ROWS_3(X) FOR_ROWS_2(X) X(2)
#define FOR_ROWS_4(X) FOR_ROWS_3(X) X(3)
#define FOR_ROWS_5(X) FOR_ROWS_4(X) X(4)
#define FOR_ROWS_6(X) FOR_ROWS_5(X) X(5)

#define MADD_bf16(c, a, b) _mm512_dpbf16_ps(c, (__m512bh)(a), (__m512bh)(b))
#define MADD_f32(c, a, b) _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), c)

#define ROW_INIT(r)                                                                                      \
    const char *a##r = (const char *)a + (r)*lda;                                                        \
    float *o##r = c + (r)*ldc;                                                                           \
    __m512 c##r##0, c##r##1, c##r##2, c##r##3;                                                           \
    if (accumulate) {                                                                                    \
        c##r##0 = _mm512_load_ps(o##r), c##r##1 = _mm512_load_ps(o##r + 16);                             \
        c##r##2 = _mm512_load_ps(o##r + 32), c##r##3 = _mm512_load_ps(o##r + 48);                        \
    } else                                                                                               \
        c##r##0 = c##r##1 = c##r##2 = c##r##3 = _mm512_setzero_ps();
#define ROW_STEP_bf16(r)                                                                                 \
    {                                                                                                    \
        __m512i av = _mm512_set1_epi32((int)((const unit_t *)a##r)[u]);                                  \
        c##r##0 = MADD_bf16(c##r##0, av, b0), c##r##1 = MADD_bf16(c##r##1, av, b1);                      \
        c##r##2 = MADD_bf16(c##r##2, av, b2), c##r##3 = MADD_bf16(c##r##3, av, b3);                      \
    }
#define ROW_STEP_f32(r)                                                                                  \
    {                                                                                                    \
        __m512i av = _mm512_set1_epi32((int)((const unit_t *)a##r)[u]);                                  \
        c##r##0 = MADD_f32(c##r##0, av, b0), c##r##1 = MADD_f32(c##r##1, av, b1);                        \
        c##r##2 = MADD_f32(c##r##2, av, b2), c##r##3 = MADD_f32(c##r##3, av, b3);                        \
    }
#define ROW_STORE(r)                                                                                     \
    _mm512_store_ps(o##r, c##r##0), _mm512_store_ps(o##r + 16, c##r##1);                                 \
    _mm512_store_ps(o##r + 32, c##r##2), _mm512_store_ps(o##r + 48, c##r##3);

/* Two flavours, by what they fetch early:
 *   stream (a lone tile): B itself, PREFETCH_BYTES ahead of the loads. A panel is followed by the next, so this bridges
 *     panels; 8 KiB measured 2 to 10 % better than 2 KiB.
 *   ahead (several tiles on one stretch of B): two lines a step from `next`, so that the first two tiles bring in the
 *     following stretch. */
#ifndef PREFETCH_BYTES
#define PREFETCH_BYTES 8192
#endif
#define PREFETCH_stream                                                                                  \
    _mm_prefetch((const char *)bp + PREFETCH_BYTES, _MM_HINT_T0);                                        \
    _mm_prefetch((const char *)bp + PREFETCH_BYTES + 64, _MM_HINT_T0);                                   \
    _mm_prefetch((const char *)bp + PREFETCH_BYTES + 128, _MM_HINT_T0);                                  \
    _mm_prefetch((const char *)bp + PREFETCH_BYTES + 192, _MM_HINT_T0);
#define PREFETCH_ahead                                                                                   \
    _mm_prefetch((const char *)next + 128 * u, _MM_HINT_T0);                                             \
    _mm_prefetch((const char *)next + 128 * u + 64, _MM_HINT_T0);

#define DEFINE_TILE(T, R, FLAVOUR)                                                                       \
    static void tile_##T##_##FLAVOUR##_##R(const void *a, long lda, const uint32_t *b, long units, float *c, \
                                           long ldc, int accumulate, const void *next) {                 \
        (void)next;                                                                                      \
        FOR_ROWS_##R(ROW_INIT);                                                                          \
        for (long u = 0; u < units; u++) {                                                               \
            const uint32_t *bp = b + u * PANEL;                                                          \
            __m512i b0 = _mm512_load_si512(bp), b1 = _mm512_load_si512(bp + 16);                         \
            __m512i b2 = _mm512_load_si512(bp + 32), b3 = _mm512_load_si512(bp + 48);                    \
            PREFETCH_##FLAVOUR FOR_ROWS_##R(ROW_STEP_##T)                                                \
        }                                                                                                \
        FOR_ROWS_##R(ROW_STORE)                                                                          \
    }

typedef void (*tile_fn)(const void *a, long lda, const uint32_t *b, long units, float *c, long ldc, int accumulate,
                        const void *next);

#define DEFINE_TILES(T, FLAVOUR)                                                                         \
    DEFINE_TILE(T, 1, FLAVOUR)                                                                           \
    DEFINE_TILE(T, 2, FLAVOUR)                                                                           \
    DEFINE_TILE(T, 3, FLAVOUR)                                                                           \
    DEFINE_TILE(T, 4, FLAVOUR)                                                                           \
    DEFINE_TILE(T, 5, FLAVOUR)                                                                           \
    DEFINE_TILE(T, 6, FLAVOUR)                                                                           \
    static const tile_fn tiles_##T##_##FLAVOUR[TILE_ROWS + 1] = {                                        \
        0,                      tile_##T##_##FLAVOUR##_1, tile_##T##_##FLAVOUR##_2, tile_##T##_##FLAVOUR##_3, \
        tile_##T##_##FLAVOUR##_4, tile_##T##_##FLAVOUR##_5, tile_##T##_##FLAVOUR##_6};

DEFINE_TILES(bf16, ahead)
DEFINE_TILES(f32, ahead)

#endif
