/* Sums of weighted rows of a float32 matrix: what decoding and gradients have in common. */
#pragma once
#include <stdint.h>
#include <string.h>

#define PART 128 /* terms summed on their own, so that the rounding of long sums does not grow with their length */

static inline void prefetch_row(const float *row, int64_t d) {
    for (int64_t i = 0; i < d; i += 16) __builtin_prefetch(row + i);
}

static inline void add_four(float *restrict sum, const float *p, const float *q, const float *r, const float *s,
                            const float w[4], int64_t d) {
#pragma omp simd
    for (int64_t i = 0; i < d; i++) sum[i] += (w[0] * p[i] + w[1] * q[i]) + (w[2] * r[i] + w[3] * s[i]);
}

static inline void add_row(float *restrict sum, const float *row, float weight, int64_t d) {
#pragma omp simd
    for (int64_t i = 0; i < d; i++) sum[i] += weight * row[i];
}

/* sum += Σ weights[order[e]] · matrix[rows[e]] for e < n; without `order`, weights[e]. `part` holds d floats. */
static inline void add_rows(float *restrict sum, float *restrict part, const float *matrix, int64_t d,
                            const int64_t *rows, const float *weights, const int64_t *order, int64_t n) {
    if (n > PART) {
        for (int64_t e = 0; e < n; e += PART) {
            memset(part, 0, d * sizeof *part);
            add_rows(part, 0, matrix, d, rows + e, order ? weights : weights + e, order ? order + e : 0,
                     n - e < PART ? n - e : PART);
            add_row(sum, part, 1, d);
        }
        return;
    }
    int64_t e = 0;
    for (; e + 4 <= n; e += 4) {
        const float *four[4];
        float w[4];
        for (int i = 0; i < 4; i++) {
            four[i] = matrix + rows[e + i] * d;
            w[i] = weights[order ? order[e + i] : e + i];
            if (e + i + 4 < n) prefetch_row(matrix + rows[e + i + 4] * d, d);
        }
        add_four(sum, four[0], four[1], four[2], four[3], w, d);
    }
    for (; e < n; e++) add_row(sum, matrix + rows[e] * d, weights[order ? order[e] : e], d);
}

static inline float dot(const float *a, const float *b, int64_t d) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; i++) sum += a[i] * b[i];
    return sum;
}
