/* Selection on one tile of products, [n, width] in float32 or bfloat16, while it is in the cache.
 *
 * A pre-activation is float32(product) + bias. Exact with respect to these numbers; among equal ones the lower index
 * wins. Rows are independent, so nothing depends on the number of threads.
 */
#include <omp.h>

#include "simd.h"

#define INLINE static inline __attribute__((always_inline))
#define BLOCK (4 * LANES) /* entries looked at between two branches */

typedef struct {
    const void *product; /* one row of the tile */
    int low;             /* bfloat16? */
    const float *bias;
} Row;

INLINE vf pre(Row row, int64_t i) {
    vf product = row.low ? load_low((const uint16_t *)row.product + i) : load((const float *)row.product + i);
    return product + load(row.bias + i);
}

INLINE float pre_one(Row row, int64_t i) {
    float product = row.low ? load_low_one((const uint16_t *)row.product + i) : ((const float *)row.product)[i];
    return product + row.bias[i];
}

INLINE const void *row_of(const void *tile, int64_t r, int64_t width, int low) {
    return (const char *)tile + r * width * (low ? 2 : 4);
}

/* Integers in the order of the floats: -0 equals 0, NaN is the largest (as torch.topk has it). */
static inline int32_t key_of(float v) {
    if (v != v) return INT32_MAX;
    v += 0.0f;
    int32_t b;
    memcpy(&b, &v, sizeof b);
    return b ^ ((b >> 31) & INT32_MAX);
}

static inline float value_of(int32_t key) {
    int32_t b = key ^ ((key >> 31) & INT32_MAX);
    float v;
    memcpy(&v, &b, sizeof v);
    return v;
}

/* How many keys are at least `least`. Keys are padded to whole vectors with INT32_MIN, which is never asked for. */
static inline int64_t count_from(const int32_t *keys, int64_t n, int32_t least) {
    vi bound = least - (vi){0};
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        vi v;
        memcpy(&v, keys + i, sizeof v);
        count += __builtin_popcountll(at_least(v, bound));
    }
    return count;
}

/* A key that k to `most` of n >= k keys reach, or the k-th largest where ties allow no such key. Pads the keys. */
static int32_t reached_by(int32_t *keys, int64_t n, int64_t k, int64_t most) {
    int32_t smallest = INT32_MAX, largest = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        smallest = keys[i] < smallest ? keys[i] : smallest;
        largest = keys[i] > largest ? keys[i] : largest;
    }
    for (int64_t i = n; i % LANES; i++) keys[i] = INT32_MIN;
    int64_t low = smallest, high = (int64_t)largest + 1; /* n keys reach low, none reaches high */
    while (high - low > 1) {
        int32_t middle = (int32_t)((low + high) >> 1);
        int64_t count = count_from(keys, n, middle);
        if (count < k) {
            high = middle;
        } else {
            low = middle;
            if (count <= most) break;
        }
    }
    return (int32_t)low;
}

/* A bound that at least k entries of the row reach: about the k-th largest maximum of 8k groups. */
INLINE float lower_bound(Row row, int64_t width, int64_t k, int32_t *keys) {
    int64_t vectors = width / LANES, size = width / (8 * k), n = 0;
    if (size < 1) size = 1;
    if (vectors / size * LANES < k) return -INFINITY;
    for (int64_t start = 0; start + size <= vectors; start += size, n += LANES) {
        vf best = splat(-INFINITY);
        for (int64_t i = start; i < start + size; i++) best = larger(pre(row, i * LANES), best);
        vi b = (vi)best, key = b ^ ((b >> 31) & INT32_MAX);
        memcpy(keys + n, &key, sizeof key);
    }
    return value_of(reached_by(keys, n, k, k + k / 8));
}

INLINE void topk_row(Row row, int64_t width, int64_t first, int64_t k, float *values, int64_t *indices,
                     int32_t *keys, int32_t *at) {
    int64_t n = first < k ? first : k; /* what the tiles before have left */
    float bound = -INFINITY;
    int32_t least = INT32_MAX;
    for (int64_t i = 0; i < n; i++) {
        keys[i] = key_of(values[i]);
        at[i] = (int32_t)indices[i];
        if (keys[i] < least) least = keys[i];
    }
    if (n == k) {
        if (least == INT32_MAX) return; /* nothing is above NaN */
        bound = value_of(least + 1);    /* of equal entries the earlier stays */
    } else if (n == 0) {
        bound = lower_bound(row, width, k, keys);
    }
    int64_t kept = n, i = 0;
    vf bounds = splat(bound);
    for (; i + BLOCK <= width; i += BLOCK) {
        uint64_t hits = 0;
        for (int part = 0; part < 4; part++) hits |= not_below(pre(row, i + part * LANES), bounds) << (part * LANES);
        for (; hits; hits &= hits - 1, n++) {
            int64_t j = i + __builtin_ctzll(hits);
            keys[n] = key_of(pre_one(row, j));
            at[n] = (int32_t)(first + j);
        }
    }
    for (; i < width; i++) {
        float v = pre_one(row, i);
        if (v < bound) continue;
        keys[n] = key_of(v);
        at[n++] = (int32_t)(first + i);
    }
    if (n == kept) return;
    int32_t kth = INT32_MIN;
    int64_t ties = 0, out = 0;
    if (n > k) {
        kth = reached_by(keys, n, k, k);
        ties = k - (kth == INT32_MAX ? 0 : count_from(keys, n, kth + 1));
    }
    for (i = 0; i < n; i++) {
        if (keys[i] > kth || (keys[i] == kth && ties-- > 0)) {
            values[out] = value_of(keys[i]);
            indices[out++] = at[i];
        }
    }
}

INLINE void topk_rows(const void *tile, int low, int64_t n, int64_t width, const float *bias, int64_t first, int64_t k,
                      float *values, int64_t *indices, int32_t *scratch, int64_t threads) {
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t r = 0; r < n; r++) {
        int32_t *keys = scratch + 2 * (k + width + LANES) * omp_get_thread_num();
        Row row = {row_of(tile, r, width, low), low, bias};
        topk_row(row, width, first, k, values + r * k, indices + r * k, keys, keys + k + width + LANES);
    }
}

/* The k largest of each row among this tile and those before it, features ascending.
 *
 * tile     products of features first .. first + width with n rows
 * bias     of these features
 * values, indices [n, k]: what the tiles before have left, min(k, first) entries; overwritten
 * scratch  2 (k + width + 16) int32 for each thread
 */
void select_topk(const void *tile, int64_t low, int64_t n, int64_t width, const float *bias, int64_t first, int64_t k,
                 float *values, int64_t *indices, int32_t *scratch, int64_t threads) {
    if (low)
        topk_rows(tile, 1, n, width, bias, first, k, values, indices, scratch, threads);
    else
        topk_rows(tile, 0, n, width, bias, first, k, values, indices, scratch, threads);
}

INLINE int64_t above_row(Row row, int64_t width, const float *floor, float *values, int32_t *at) {
    int64_t n = 0, i = 0;
    for (; i + BLOCK <= width; i += BLOCK) {
        uint64_t hits = 0;
        for (int part = 0; part < 4; part++) {
            int64_t j = i + part * LANES;
            hits |= above(pre(row, j), load(floor + j)) << (part * LANES);
        }
        for (; hits; hits &= hits - 1, n++) {
            int64_t j = i + __builtin_ctzll(hits);
            values[n] = pre_one(row, j);
            at[n] = (int32_t)j;
        }
    }
    for (; i < width; i++) {
        float v = pre_one(row, i);
        if (!(v > floor[i])) continue;
        values[n] = v;
        at[n++] = (int32_t)i;
    }
    return n;
}

/* The tile's entries above their feature's floor [width]: those of a row together and ascending, the rows in any order.
 *
 * first, start   the tile's first feature and row
 * values, rows, features [capacity]; where it does not suffice they are incomplete
 * found          how many entries there are
 * scratch        2 width int32 for each thread
 */
void select_above(const void *tile, int64_t low, int64_t n, int64_t width, const float *bias, const float *floor,
                  int64_t first, int64_t start, int64_t capacity, float *values, int64_t *rows, int64_t *features,
                  int64_t *found, int32_t *scratch, int64_t threads) {
    int64_t total = 0;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads)
    for (int64_t r = 0; r < n; r++) {
        int32_t *at = scratch + 2 * width * omp_get_thread_num();
        float *v = (float *)(at + width);
        const void *row = row_of(tile, r, width, low);
        int64_t place, m = low ? above_row((Row){row, 1, bias}, width, floor, v, at)
                               : above_row((Row){row, 0, bias}, width, floor, v, at);
        if (!m) continue;
#pragma omp atomic capture
        {
            place = total;
            total += m;
        }
        if (place + m > capacity) continue;
        memcpy(values + place, v, m * sizeof *v);
        for (int64_t e = 0; e < m; e++) {
            rows[place + e] = start + r;
            features[place + e] = first + at[e];
        }
    }
    *found = total;
}
