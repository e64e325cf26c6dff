/* Decoding, error and value gradients of one batch row while its decoder rows are in the cache. */
#include <omp.h>

#include "rows.h"

/* The first entry of the row that lies at or beyond `end`. */
static int64_t until(const int64_t *indices, int64_t entry, int64_t last, int64_t end) {
    while (entry < last && indices[entry] < end) entry++;
    return entry;
}

static void reconstruct_row(int64_t b, int64_t B, int64_t d, const int64_t *offsets, const int64_t *indices,
                            const float *values, const float *W_dec, const float *b_dec, const float *target,
                            int64_t G, const int64_t *ends, const float *weights, float *error, float *value_grads,
                            float *squared, float *restrict made, float *part) {
    const int64_t first = offsets[b], last = offsets[b + 1];
    const float *restrict wanted = target + b * d;
    memcpy(made, b_dec, d * sizeof *made);
    for (int64_t g = 0, entry = first; g < G; g++) {
        int64_t stop = until(indices, entry, last, ends[g]);
        add_rows(made, part, W_dec, d, indices + entry, values + entry, 0, stop - entry);
        entry = stop;
        float *restrict out = error + (g * B + b) * d;
        float sum = 0, weight = weights[g];
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < d; i++) {
            float miss = made[i] - wanted[i];
            sum += miss * miss;
            out[i] = weight * miss;
        }
        squared[g * B + b] = sum;
    }
    for (int64_t g = G - 2; g >= 0; g--) add_row(error + (g * B + b) * d, error + ((g + 1) * B + b) * d, 1, d);
    for (int64_t g = 0, entry = first; g < G; g++) {
        const float *miss = error + (g * B + b) * d;
        for (int64_t stop = until(indices, entry, last, ends[g]); entry < stop; entry++)
            value_grads[entry] = dot(miss, W_dec + indices[entry] * d, d);
    }
}

/* See reconstruct.py; `scratch` is [threads, 2, d], all matrices are contiguous float32. */
void reconstruct(int64_t B, int64_t d, const int64_t *offsets, const int64_t *indices, const float *values,
                 const float *W_dec, const float *b_dec, const float *target, int64_t G, const int64_t *ends,
                 const float *weights, float *error, float *value_grads, float *squared, float *scratch,
                 int64_t threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t b = 0; b < B; b++) {
        float *made = scratch + 2 * d * omp_get_thread_num();
        reconstruct_row(b, B, d, offsets, indices, values, W_dec, b_dec, target, G, ends, weights, error, value_grads,
                        squared, made, made + d);
    }
}
