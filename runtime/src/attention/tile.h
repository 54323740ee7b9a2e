// Attends to keys block by block: scores, their exponentials under a maximum that grows, and sums of values by them
// (the "online softmax" of FlashAttention, Dao et al. 2022). Keys and values are read once for kRows rows of queries.
#pragma once

#include "attention/exp.h"
#include "simd/vec.h"
#include "task/attention_tile.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// Rows of queries in registers at once, and with them keys, or vectors of values.
constexpr size_t kRows = 4;
constexpr size_t kColumns = Vec::kRegisters == 32 ? 4 : 2;
constexpr float kNone = -__builtin_inff();

// scores [rows][kAttentionKeys]: products of queries [rows][size] with `count` keys [count][size].
template <typename V, size_t rows>
void score_rows(const float* queries, const float* keys, size_t count, size_t size, float* scores) {
  for (size_t first = 0; first < count; first += kColumns) {
    const float* columns[kColumns];  // the last one again and again where there are no more
    for (size_t j = 0; j < kColumns; ++j) columns[j] = keys + smaller(first + j, count - 1) * size;
    typename V::Floats acc[rows][kColumns] = {};
    for (size_t i = 0; i < size; i += V::kLanes) {
      typename V::Floats key[kColumns];
#pragma GCC unroll 4
      for (size_t j = 0; j < kColumns; ++j) key[j] = V::LoadU(f32, columns[j] + i);
#pragma GCC unroll 4
      for (size_t r = 0; r < rows; ++r) {
        const typename V::Floats query = V::LoadU(f32, queries + r * size + i);
#pragma GCC unroll 4
        for (size_t j = 0; j < kColumns; ++j) acc[r][j] = V::MulAdd(query, key[j], acc[r][j]);
      }
    }
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < kColumns && first + j < count; ++j) {
        scores[r * kAttentionKeys + first + j] = V::ReduceSum(f32, acc[r][j]);
      }
    }
  }
}

// out [rows][size] += weights [rows][kAttentionKeys] times `count` values [count][size], of `vectors` vectors from
// column `first` on.
template <typename V, size_t rows, size_t vectors>
void add_columns(const float* weights, const float* values, size_t count, size_t size, size_t first, float* out) {
  typename V::Floats acc[rows][vectors];
#pragma GCC unroll 4
  for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; ++v) acc[r][v] = V::LoadU(f32, out + r * size + first + v * V::kLanes);
  }
  for (size_t j = 0; j < count; ++j) {
    typename V::Floats value[vectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; ++v) value[v] = V::LoadU(f32, values + j * size + first + v * V::kLanes);
#pragma GCC unroll 4
    for (size_t r = 0; r < rows; ++r) {
      const typename V::Floats weight = V::Set(f32, weights[r * kAttentionKeys + j]);
#pragma GCC unroll 4
      for (size_t v = 0; v < vectors; ++v) acc[r][v] = V::MulAdd(weight, value[v], acc[r][v]);
    }
  }
#pragma GCC unroll 4
  for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; ++v) V::StoreU(acc[r][v], out + r * size + first + v * V::kLanes);
  }
}

template <typename V, size_t rows>
void add_values(const float* weights, const float* values, size_t count, size_t size, float* out) {
  size_t first = 0;
  for (; first + kColumns * V::kLanes <= size; first += kColumns * V::kLanes) {
    add_columns<V, rows, kColumns>(weights, values, count, size, first, out);
  }
  for (; first < size; first += V::kLanes) add_columns<V, rows, 1>(weights, values, count, size, first, out);
}

template <typename V>
inline float largest(const float* values) {
  typename V::Floats all = V::LoadU(f32, values);
  for (size_t i = V::kLanes; i < kAttentionKeys; i += V::kLanes) all = V::Max(all, V::LoadU(f32, values + i));
  float lanes[V::kLanes];
  V::StoreU(all, lanes);
  float result = lanes[0];
  for (size_t i = 1; i < V::kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return result;
}

inline bool any_nan(const float* values) {
  bool result = false;
  for (size_t j = 0; j < kAttentionKeys; ++j) result |= values[j] != values[j];
  return result;
}

// Scores of a row, of which it attends to one at least → their exponentials, and the row's sums so far → those under
// the new maximum.
template <typename V>
inline void weigh_row(size_t size, float* scores, float* values, float* weight, float* maximum) {
  const float top = largest<V>(scores);
  if (top > *maximum) {
    if (*maximum > kNone) {
      const typename V::Floats factor = exp_of_negative<V>(V::Set(f32, *maximum - top));
      for (size_t i = 0; i < size; i += V::kLanes) {
        V::StoreU(V::Mul(V::LoadU(f32, values + i), factor), values + i);
      }
      *weight *= factor[0];
    }
    *maximum = top;
  }
  if (*maximum == kNone && !any_nan(scores)) {  // keys that nothing attends to
    for (size_t j = 0; j < kAttentionKeys; ++j) scores[j] = 0.0f;
    return;
  }
  const typename V::Floats shift = V::Set(f32, *maximum);
  typename V::Floats sum = V::Zero(f32);
  for (size_t j = 0; j < kAttentionKeys; j += V::kLanes) {
    const typename V::Floats power = exp_of_negative<V>(V::Sub(V::LoadU(f32, scores + j), shift));
    V::StoreU(power, scores + j);
    sum = V::Add(sum, power);
  }
  *weight += V::ReduceSum(f32, sum);
}

template <typename V>
void attend_with(const AttentionTile& tile, const AttentionSums& sums, float* scores) {
  const size_t size = tile.head_size, quads = tile.rows / kRows * kRows;
  for (size_t i = 0; i < tile.rows * size; ++i) sums.values[i] = 0.0f;
  for (size_t r = 0; r < tile.rows; ++r) {
    sums.weights[r] = 0.0f;
    sums.maxima[r] = kNone;
  }
  for (size_t begin = tile.begin; begin < tile.end; begin += kAttentionKeys) {
    const size_t end = smaller(begin + kAttentionKeys, tile.end), count = end - begin;
    const float* keys = tile.keys + begin * size;
    const float* values = tile.values + begin * size;
    for (size_t r = 0; r < tile.rows; r += r < quads ? kRows : 1) {
      (r < quads ? score_rows<V, kRows> : score_rows<V, 1>)(tile.queries + r * size, keys, count, size,
                                                       scores + r * kAttentionKeys);
    }
    for (size_t r = 0; r < tile.rows; ++r) {
      float* row = scores + r * kAttentionKeys;
      const size_t first = larger(row_begin(tile, r), begin), last = smaller(row_end(tile, r), end);
      if (first >= last) {
        for (size_t j = 0; j < kAttentionKeys; ++j) row[j] = 0.0f;
        continue;
      }
      for (size_t j = 0; j < kAttentionKeys; ++j) {
        if (begin + j < first || begin + j >= last) row[j] = kNone;
      }
      weigh_row<V>(size, row, sums.values + r * size, sums.weights + r, sums.maxima + r);
    }
    for (size_t r = 0; r < tile.rows; r += r < quads ? kRows : 1) {
      (r < quads ? add_values<V, kRows> : add_values<V, 1>)(scores + r * kAttentionKeys, values, count, size,
                                                       sums.values + r * size);
    }
  }
}

// scores: room for kAttentionScores.
void attend(const AttentionTile& tile, const AttentionSums& sums, float* scores) {
  (tile.head_size % (2 * Vec::kLanes) ? attend_with<Vec::Half> : attend_with<Vec>)(tile, sums, scores);
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
