// Products with activations of float32 (accuracy_level 0), of every layout. Weights are decoded, to a buffer of floats
// where many rows of activations share it, else to bytes.
#pragma once

#include "decode/decode.h"
#include "decode/decoded_rows.h"
#include "simd/turn.h"
#include "simd/vector.h"
#include "task/outer_tile.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// Columns [begin, end) of a row, whole blocks, as the floats they stand for. bytes, kept: room for end - begin.
void decode_floats(const Weight& w, size_t row, size_t begin, size_t end, uint8_t* bytes, uint8_t* kept, float* out) {
  const Layout& layout = *w.layout;
  uint8_t* mask = layout.needs_mask() ? kept : nullptr;
  for_each_part(layout, row, row + 1, begin, end, [&](const Part& part) {
    const Encoding& e = layout.segments[part.segment].encoding;
    const uint16_t* scales = first_scale(w, part.segment, row);
    decode(w, part, bytes, 0, mask);
    for (size_t block = part.begin; block < part.end; block += layout.block_size) {
      const float scale = float_from_half(scales[block / layout.block_size * scale_step(layout)]) * e.unit;
      const uint8_t* in = bytes + (block - part.begin);
      float* values = out + (block - begin);
      for (size_t i = 0; i < layout.block_size; ++i) {
        values[i] = (static_cast<float>(static_cast<int>(in[i])) - e.bias) * scale;
      }
      if (mask) {
        const uint8_t* stored = mask + (block - part.begin);
        for (size_t i = 0; i < layout.block_size; ++i) values[i] = stored[i] ? values[i] : 0.0f;
      }
    }
  });
}

static_assert(kOuterOutputs == kTurnedOutputs, "rows are turned for the outer-product kernel");

// --- many rows of activations ------------------------------------------------------------------------------------

// y[i][j] += sum over k of a[i][k] * b[k][j], for kOuterOutputs outputs of which the first `outputs` exist.
template <size_t rows>
void outer_kernel(const float* a, size_t a_stride, const float* b, size_t b_stride, size_t depth, size_t outputs,
                  float* y, size_t y_stride) {
  Vector acc[rows][2] = {};
  for (size_t k = 0; k < depth; ++k) {
    const Vector left = load(b + k * b_stride), right = load(b + k * b_stride + kLanes);
#pragma GCC unroll 16
    for (size_t i = 0; i < rows; ++i) {
      const float x = a[i * a_stride + k];
      acc[i][0] += x * left;
      acc[i][1] += x * right;
    }
  }
#pragma GCC unroll 16
  for (size_t i = 0; i < rows; ++i) {
    float* out = y + i * y_stride;
    if (outputs == kOuterOutputs) {
      store(out, load(out) + acc[i][0]);
      store(out + kLanes, load(out + kLanes) + acc[i][1]);
    } else {
      float sums[kOuterOutputs];
      store(sums, acc[i][0]);
      store(sums + kLanes, acc[i][1]);
      for (size_t j = 0; j < outputs; ++j) out[j] += sums[j];
    }
  }
}

// Outputs [first, first + outputs) of all rows of A += the products of columns [k, k + depth) of A with b [depth][…].
void add_products(const Task& task, size_t k, size_t depth, const float* b, size_t b_stride, size_t first,
                  size_t outputs) {
  const size_t a_stride = task.k(), n = task.n();
  const float* a = task.a + k;
  float* y = task.y + first;
  size_t i = 0;
  const auto take = [&](auto kernel, size_t rows) {
    for (; i + rows <= task.m; i += rows) kernel(a + i * a_stride, a_stride, b, b_stride, depth, outputs, y + i * n, n);
  };
  take(outer_kernel<kOuterRows>, kOuterRows);
  take(outer_kernel<kOuterRows / 3>, kOuterRows / 3);
  take(outer_kernel<1>, 1);
}

void start_outputs(const Task& task, size_t first, size_t count) {
  for (size_t i = 0; i < task.m; ++i) {
    for (size_t j = first; j < first + count; ++j) task.y[i * task.n() + j] = task.bias ? task.bias[j] : 0.0f;
  }
}

size_t dot_depth(const Layout& layout) {
  const size_t depth = larger(layout.block_size, kDepth / layout.block_size * layout.block_size);
  return smaller(depth, layout.columns);
}

// B = S.T: a row of the stored matrix is one output, so rows are turned to columns. rows, turned: room for kOuterOutputs
// of them, each of dot_depth rounded up to whole vectors.
void dot_tile(const Task& task, size_t tile, float* rows, float* turned, uint8_t* bytes, uint8_t* kept) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t tile_end = smaller((tile + 1) * task.tile_outputs, layout.rows);
  const size_t depth = dot_depth(layout);
  for (size_t first = tile * task.tile_outputs; first < tile_end; first += kOuterOutputs) {
    const size_t outputs = smaller(kOuterOutputs, tile_end - first);
    start_outputs(task, first, outputs);
    for (size_t begin = 0; begin < layout.columns; begin += depth) {
      const size_t end = smaller(begin + depth, layout.columns), stride = round_up(end - begin, kLanes);
      for (size_t j = 0; j < outputs; ++j) decode_floats(w, first + j, begin, end, bytes, kept, rows + j * stride);
      std::memset(rows + outputs * stride, 0, (kOuterOutputs - outputs) * stride * sizeof(float));
      turn(reinterpret_cast<const uint8_t*>(rows), stride * sizeof(float), reinterpret_cast<uint8_t*>(turned));
      add_products(task, begin, end - begin, turned, kOuterOutputs, first, outputs);
    }
  }
}

// B = S: a row of the stored matrix is one step of the sum.
void outer_tile(const Task& task, const OuterTile& range, float* weights, uint8_t* bytes, uint8_t* kept) {
  const Weight& w = *task.weight;
  const size_t first = range.first, outputs = range.last - range.first;
  const size_t stride = round_up(outputs, kOuterOutputs);
  start_outputs(task, first, outputs);
  for (size_t begin = range.row_begin; begin < range.row_end; begin += kOuterDepth) {
    const size_t depth = smaller(kOuterDepth, range.row_end - begin);
    for (size_t k = 0; k < depth; ++k) {
      float* row = weights + k * stride;
      decode_floats(w, begin + k, first, first + outputs, bytes, kept, row);
      std::memset(row + outputs, 0, (stride - outputs) * sizeof(float));
    }
    for (size_t j = 0; j < outputs; j += kOuterOutputs) {
      add_products(task, begin, depth, weights + j, stride, first + j, smaller(kOuterOutputs, outputs - j));
    }
  }
}

// --- few rows of activations: decoded bytes are multiplied without a buffer of floats -------------------------------

inline Vector floats_from_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(
      _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector>(
      _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  Vector v;
  for (size_t i = 0; i < kLanes; ++i) v[i] = static_cast<float>(static_cast<int>(p[i]));
  return v;
#endif
}

bool is_direct(const Task& task) {
  const Layout& layout = *task.weight->layout;
  return task.m <= kDirectRows && !layout.needs_mask() && layout.block_size % kLanes == 0;
}

// B = S.T
template <size_t rows>
void direct_dot_kernel(const Task& task, const DecodedRows& decoded, size_t i, size_t first, size_t outputs) {
  const Layout& layout = *task.weight->layout;
  Vector acc[rows][kDotOutputs] = {};
  for (size_t block = 0; block < layout.blocks; ++block) {
    Vector sums[rows][kDotOutputs] = {};
    const size_t end = (block + 1) * layout.block_size;
    for (size_t k = block * layout.block_size; k < end; k += kLanes) {
      Vector x[rows];
      for (size_t r = 0; r < rows; ++r) x[r] = load(task.a + (i + r) * task.k() + k);
      for (size_t j = 0; j < kDotOutputs; ++j) {
        const Vector weights = floats_from_bytes(decoded.bytes[j] + k) - decoded.biases[j][block];
        for (size_t r = 0; r < rows; ++r) sums[r][j] += x[r] * weights;
      }
    }
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < kDotOutputs; ++j) acc[r][j] += sums[r][j] * decoded.scales[j][block];
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t j = 0; j < outputs; ++j) {
      const float bias = task.bias ? task.bias[first + j] : 0.0f;
      task.y[(i + r) * layout.rows + first + j] = sum_lanes(acc[r][j]) + bias;
    }
  }
}

// B = S: y[i][j] += sum over the part's rows k of a[i][k] * scales[k] * (bytes[k][j] - bias), for `vectors` vectors of
// columns of one block.
template <size_t rows, size_t vectors>
void direct_outer_kernel(const float* a, size_t a_stride, const uint8_t* bytes, size_t stride, const float* scales,
                         float bias, size_t depth, float* y, size_t y_stride) {
  Vector acc[rows][vectors] = {};
  for (size_t k = 0; k < depth; ++k) {
    Vector weights[vectors];
    for (size_t v = 0; v < vectors; ++v) weights[v] = floats_from_bytes(bytes + k * stride + v * kLanes) - bias;
    for (size_t i = 0; i < rows; ++i) {
      const Vector x = broadcast(a[i * a_stride + k] * scales[k]);
      for (size_t v = 0; v < vectors; ++v) acc[i][v] += x * weights[v];
    }
  }
  for (size_t i = 0; i < rows; ++i) {
    for (size_t v = 0; v < vectors; ++v) {
      float* out = y + i * y_stride + v * kLanes;
      store(out, load(out) + acc[i][v]);
    }
  }
}

void direct_outer_tile(const Task& task, const OuterTile& range, uint8_t* bytes) {
  constexpr size_t kVectors = 4;
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t n = layout.columns, first = range.first, last = range.last;
  start_outputs(task, first, last - first);
  for (size_t begin = range.row_begin; begin < range.row_end; begin += kOuterDepth) {
    for_each_part(layout, begin, smaller(begin + kOuterDepth, range.row_end), first, last, [&](const Part& part) {
      const Encoding& e = layout.segments[part.segment].encoding;
      const size_t stride = part.end - part.begin, depth = part.row_end - part.row_begin;
      decode(w, part, bytes, stride, nullptr);
      for (size_t block = part.begin; block < part.end; block += layout.block_size) {
        float scales[kOuterDepth];
        for (size_t k = 0; k < depth; ++k) {
          const uint16_t* row_scales = first_scale(w, part.segment, part.row_begin + k);
          scales[k] = e.unit * float_from_half(row_scales[block / layout.block_size * scale_step(layout)]);
        }
        for (size_t j = block; j < block + layout.block_size;) {
          const bool wide = block + layout.block_size - j >= kVectors * kLanes;
          for (size_t i = 0; i < task.m;) {
            const bool full = task.m - i >= kDirectOuterRows;
            const auto kernel = full ? (wide ? direct_outer_kernel<kDirectOuterRows, kVectors>
                                             : direct_outer_kernel<kDirectOuterRows, 1>)
                                     : (wide ? direct_outer_kernel<1, kVectors> : direct_outer_kernel<1, 1>);
            kernel(task.a + i * task.k() + part.row_begin, task.k(), bytes + (j - part.begin), stride, scales,
                   e.bias, depth, task.y + i * n + j, n);
            i += full ? kDirectOuterRows : 1;
          }
          j += wide ? kVectors * kLanes : kLanes;
        }
      }
    });
  }
}

// Outputs at a time of a tile with B = S, whole blocks: what is decoded stays in the second cache, and small.
size_t outer_width(const Task& task) {
  const size_t block = task.weight->layout->block_size;
  return smaller(task.tile_outputs, larger(block, 512 / block * block));
}

// --- whole tiles -------------------------------------------------------------------------------------------------

size_t float_scratch_bytes(const Task& task) {
  const Layout& layout = *task.weight->layout;
  if (is_direct(task)) return layout.trans_b ? decoded_bytes(layout) : kOuterDepth * task.tile_outputs;
  if (layout.trans_b) {
    const size_t depth = dot_depth(layout);
    return 2 * kOuterOutputs * round_up(depth, kLanes) * sizeof(float) + 2 * depth;
  }
  const size_t width = outer_width(task);
  return kOuterDepth * round_up(width, kOuterOutputs) * sizeof(float) + 2 * width;
}

void float_tile(const Task& task, size_t tile, void* scratch) {
  const Layout& layout = *task.weight->layout;
  uint8_t* memory = static_cast<uint8_t*>(scratch);
  float* weights = static_cast<float*>(scratch);
  if (layout.trans_b) {
    if (is_direct(task)) {
      return decoded_tile<kDirectDotRows>(task, tile, scratch, direct_dot_kernel<kDirectDotRows>, direct_dot_kernel<1>);
    }
    const size_t depth = dot_depth(layout), size = kOuterOutputs * round_up(depth, kLanes);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(weights + 2 * size);
    return dot_tile(task, tile, weights, weights + size, bytes, bytes + depth);
  }
  const OuterTile range = outer_tile_of(task, tile);
  Task own = task;  // with the outputs of this part of the sum
  own.y = range.y;
  own.bias = range.bias;
  if (is_direct(task)) return direct_outer_tile(own, range, memory);
  const size_t width = outer_width(task);
  uint8_t* bytes = memory + kOuterDepth * round_up(width, kOuterOutputs) * sizeof(float);
  for (OuterTile piece = range; piece.first < range.last; piece.first = piece.last) {
    piece.last = smaller(piece.first + width, range.last);
    outer_tile(own, piece, weights, bytes, bytes + width);
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
