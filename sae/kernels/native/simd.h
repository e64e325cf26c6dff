/* Vectors as wide as the target's registers, in the words of GCC and Clang; intrinsics only where they have none. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#if LANES > 4
#include <immintrin.h>
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));

static inline vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* bfloat16 is the upper half of a float. */
static inline vf load_low(const uint16_t *p) {
#if LANES == 16
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif LANES == 8
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
#else
    uint16_t h[LANES];
    memcpy(h, p, sizeof h);
    vu wide;
    for (int lane = 0; lane < LANES; lane++) wide[lane] = h[lane];
    return (vf)(wide << 16);
#endif
}

static inline float load_low_one(const uint16_t *p) {
    uint32_t u = (uint32_t)*p << 16;
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}

static inline vf splat(float x) { return x - (vf){0}; }

/* Lane by lane the larger; where v is NaN, m. */
static inline vf larger(vf v, vf m) {
#if LANES == 16
    return (vf)_mm512_max_ps((__m512)v, (__m512)m);
#elif LANES == 8
    return (vf)_mm256_max_ps((__m256)v, (__m256)m);
#else
    vi keep = v > m;
    return (vf)((keep & (vi)v) | (~keep & (vi)m));
#endif
}

/* One bit for every lane that is set. */
static inline uint64_t bits(vi set) {
    uint64_t out = 0;
    for (int lane = 0; lane < LANES; lane++) out |= (uint64_t)(set[lane] & 1) << lane;
    return out;
}

/* The lanes in which a > b; NaN is above nothing. */
static inline uint64_t above(vf a, vf b) {
#if LANES == 16
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#elif LANES == 8
    return (uint64_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ));
#else
    return bits(a > b);
#endif
}

/* The lanes in which not a < b: NaN is among them. */
static inline uint64_t not_below(vf a, vf b) {
#if LANES == 16
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ);
#elif LANES == 8
    return (uint64_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ));
#else
    return bits(~(a < b));
#endif
}

/* The lanes in which a >= b. */
static inline uint64_t at_least(vi a, vi b) {
#if LANES == 16
    return _mm512_cmpge_epi32_mask((__m512i)a, (__m512i)b);
#elif LANES == 8
    return 0xff & ~(uint64_t)_mm256_movemask_ps((__m256)(b > a));
#else
    return bits(a >= b);
#endif
}
