/* One pass over the rows of a weight matrix: gradient from the codes, projection, Adam, unit norm, bfloat16 copy.
 *
 * A row's gradient lives only while the row is updated. Rows are independent and each is summed in one order, so the
 * result does not depend on the number of threads.
 */
#include <math.h>
#include <omp.h>

#include "rows.h"

#define FEATURES 16 /* a thread takes so many at once: features fire unevenly */

typedef struct {
    float keep1, add1, keep2, add2, size, root, eps; /* β, 1 − β, lr / (1 − β1^t), 1 / sqrt(1 − β2^t), ε */
} Adam;

static void adam_row(float *restrict w, float *restrict m, float *restrict v, const float *restrict grad, int64_t d,
                     Adam a) {
    if (!m) { /* β1 = 0: the first moment is the gradient */
#pragma omp simd
        for (int64_t i = 0; i < d; i++) {
            v[i] = a.keep2 * v[i] + a.add2 * grad[i] * grad[i];
            w[i] -= a.size * grad[i] / (sqrtf(v[i]) * a.root + a.eps);
        }
        return;
    }
#pragma omp simd
    for (int64_t i = 0; i < d; i++) {
        m[i] = a.keep1 * m[i] + a.add1 * grad[i];
        v[i] = a.keep2 * v[i] + a.add2 * grad[i] * grad[i];
        w[i] -= a.size * m[i] / (sqrtf(v[i]) * a.root + a.eps);
    }
}

static void multiply(float *restrict row, float factor, int64_t d) {
#pragma omp simd
    for (int64_t i = 0; i < d; i++) row[i] *= factor;
}

/* Round to nearest, ties to even, as torch does. */
static void to_bfloat16(uint16_t *restrict low, const float *restrict row, int64_t d) {
#pragma omp simd
    for (int64_t i = 0; i < d; i++) {
        uint32_t u;
        memcpy(&u, row + i, sizeof u);
        uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        low[i] = (uint16_t)(row[i] != row[i] ? 0x7fc0 : rounded);
    }
}

/* How many of the ascending features are below `feature`. */
static int64_t below(const int64_t *features, int64_t n, int64_t feature) {
    int64_t low = 0, high = n;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (features[middle] < feature)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* weight [F, d], m (or none, β1 = 0) and v: updated in place
 * fresh [F]      with β1 = 0, or none: the step up to which v has decayed; rows without gradient are then not touched
 * low [F, d]     the weight's bfloat16 copy, or none
 * offsets, order, rows   the codes by feature; gradient of row j += Σ strengths[order[e]] · sources[level of j, rows[e]]
 * sources [G, B, d], ends [G]   of the levels
 * extra [n_extra, d] more gradient for the rows extra_features (ascending), or none
 * along [F]      or none: gradient of row j += along[j] · direction, which is the row itself where none is given
 * squared        the squared norm of each block's gradient before `scale`, [F / 16, rounded up]
 * scratch        [threads, 2, d]
 */
void update_matrix(float *weight, float *m, float *v, int32_t *fresh, uint16_t *low, int64_t F, int64_t d,
                   const int64_t *offsets, const int64_t *order, const int64_t *rows, const float *strengths,
                   const float *sources, int64_t B, const int64_t *ends, const int64_t *extra_features,
                   int64_t n_extra, const float *extra, const float *along, const float *direction, double lr,
                   double beta1, double beta2, double eps, int64_t step, int64_t unit_norm, double scale,
                   double *squared, float *scratch, int64_t threads) {
    const Adam adam = {beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - pow(beta1, step)),
                       1 / sqrt(1 - pow(beta2, step)), eps};
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t block = 0; block < (F + FEATURES - 1) / FEATURES; block++) {
        float *grad = scratch + 2 * d * omp_get_thread_num(), *part = grad + d;
        int64_t start = block * FEATURES, stop = start + FEATURES < F ? start + FEATURES : F, level = 0;
        int64_t next = below(extra_features, n_extra, start);
        squared[block] = 0;
        for (int64_t j = start; j < stop; j++) {
            const int64_t first = offsets[j], n = offsets[j + 1] - first;
            const int has_extra = next < n_extra && extra_features[next] == j, idle = !n && !has_extra && !along;
            if (idle && fresh) continue;
            float *w = weight + j * d;
            while (ends[level] <= j) level++;
            memset(grad, 0, d * sizeof *grad);
            add_rows(grad, part, sources + level * B * d, d, rows + first, strengths, order + first, n);
            if (has_extra) add_row(grad, extra + next++ * d, 1, d);
            if (along) add_row(grad, direction ? direction : w, along[j], d);
            if (!idle) {
                if (unit_norm) add_row(grad, w, -dot(grad, w, d), d);
                squared[block] += dot(grad, grad, d);
                if (scale != 1) multiply(grad, scale, d);
            }
            if (fresh) {
                if (fresh[j] < step - 1) multiply(v + j * d, pow(beta2, step - 1 - fresh[j]), d);
                fresh[j] = step;
            }
            adam_row(w, m ? m + j * d : 0, v + j * d, grad, d, adam);
            if (unit_norm) multiply(w, 1 / sqrtf(dot(w, w, d)), d);
            if (low) to_bfloat16(low + j * d, w, d);
        }
    }
}
