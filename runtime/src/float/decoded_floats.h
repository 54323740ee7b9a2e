// Multiplies float32 activations (accuracy_level 0) with weights of every layout, which are decoded to a buffer of
// floats that rows of activations share.
#pragma once

#include "decode/decode.h"
#include "simd/turn.h"
#include "simd/vec.h"
#include "task/outer_tile.h"
#include "task/outputs.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// Rows of A held in registers.
constexpr size_t kOuterRows = Vec::kBytes == 64 ? 12 : Vec::kBytes == 32 ? 6 : 4;
constexpr size_t kDotDepth = 256;  // wanted length of sums over columns between additions to Y

bool floats_dot_supported(const Layout& layout, size_t) { return layout.trans_b; }

bool floats_outer_supported(const Layout& layout, size_t) { return !layout.trans_b; }

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

// y[i][j] += sum over k of a[i][k] * b[k][j], for kTurnedOutputs outputs of which the first `outputs` exist.
template <size_t rows>
void outer_kernel(const float* a, size_t a_stride, const float* b, size_t b_stride, size_t depth, size_t outputs,
                  float* y, size_t y_stride) {
  Vec::Floats acc[rows][2] = {};
  for (size_t k = 0; k < depth; ++k) {
    const float* columns = b + k * b_stride;
    const Vec::Floats left = Vec::LoadU(f32, columns), right = Vec::LoadU(f32, columns + Vec::kLanes);
#pragma GCC unroll 16
    for (size_t i = 0; i < rows; ++i) {
      const Vec::Floats x = Vec::Set(f32, a[i * a_stride + k]);
      acc[i][0] = Vec::MulAdd(x, left, acc[i][0]);
      acc[i][1] = Vec::MulAdd(x, right, acc[i][1]);
    }
  }
#pragma GCC unroll 16
  for (size_t i = 0; i < rows; ++i) {
    float* out = y + i * y_stride;
    if (outputs == kTurnedOutputs) {
      Vec::StoreU(Vec::Add(Vec::LoadU(f32, out), acc[i][0]), out);
      Vec::StoreU(Vec::Add(Vec::LoadU(f32, out + Vec::kLanes), acc[i][1]), out + Vec::kLanes);
    } else {
      float sums[kTurnedOutputs];
      Vec::StoreU(acc[i][0], sums);
      Vec::StoreU(acc[i][1], sums + Vec::kLanes);
      for (size_t j = 0; j < outputs; ++j) out[j] += sums[j];
    }
  }
}

// Outputs [first, first + outputs) of all rows of A += the products of columns [k, k + depth) of A with b [depth][…].
void add_products(const Task& task, size_t k, size_t depth, const float* b, size_t b_stride, size_t first,
                  size_t outputs) {
  const size_t a_stride = task.k(), n = task.y_stride;
  const float* a = task.a + k;
  float* y = task.output(0, first);
  size_t i = 0;
  const auto take = [&](auto kernel, size_t rows) {
    for (; i + rows <= task.m; i += rows) kernel(a + i * a_stride, a_stride, b, b_stride, depth, outputs, y + i * n, n);
  };
  take(outer_kernel<kOuterRows>, kOuterRows);
  take(outer_kernel<kOuterRows / 3>, kOuterRows / 3);
  take(outer_kernel<1>, 1);
}

size_t dot_depth(const Layout& layout) {
  const size_t depth = larger(layout.block_size, kDotDepth / layout.block_size * layout.block_size);
  return smaller(depth, layout.columns);
}

// B = S.T: a row of the stored matrix is one output, so kTurnedOutputs rows at a time are turned to columns. Working
// memory: the rows, each of dot_depth rounded up to whole vectors, the same turned, and the bytes and marks of one.
size_t floats_dot_scratch_bytes(const Task& task) {
  const size_t depth = dot_depth(*task.weight->layout);
  return 2 * kTurnedOutputs * round_up(depth, Vec::kLanes) * sizeof(float) + 2 * depth;
}

void floats_dot_tile(const Task& task, const Range& range, void* scratch) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t depth = dot_depth(layout), size = kTurnedOutputs * round_up(depth, Vec::kLanes);
  float* rows = static_cast<float*>(scratch);
  float* turned = rows + size;
  uint8_t* bytes = reinterpret_cast<uint8_t*>(turned + size);
  uint8_t* kept = bytes + depth;
  for (size_t first = range.first; first < range.last; first += kTurnedOutputs) {
    const size_t outputs = smaller(kTurnedOutputs, range.last - first);
    start_outputs(task, first, outputs);
    for (size_t begin = 0; begin < layout.columns; begin += depth) {
      const size_t end = smaller(begin + depth, layout.columns), stride = round_up(end - begin, Vec::kLanes);
      for (size_t j = 0; j < outputs; ++j) decode_floats(w, first + j, begin, end, bytes, kept, rows + j * stride);
      std::memset(rows + outputs * stride, 0, (kTurnedOutputs - outputs) * stride * sizeof(float));
      turn(reinterpret_cast<const uint8_t*>(rows), stride * sizeof(float), reinterpret_cast<uint8_t*>(turned));
      add_products(task, begin, end - begin, turned, kTurnedOutputs, first, outputs);
    }
  }
}

// B = S: a row of the stored matrix is one step of the sum. task: its outputs are those of `range`.
void floats_outer_piece(const Task& task, const OuterTile& range, float* weights, uint8_t* bytes, uint8_t* kept) {
  const Weight& w = *task.weight;
  const size_t first = range.first, outputs = range.last - range.first;
  const size_t stride = round_up(outputs, kTurnedOutputs);
  start_outputs(task, first, outputs);
  for (size_t begin = range.row_begin; begin < range.row_end; begin += kOuterDepth) {
    const size_t depth = smaller(kOuterDepth, range.row_end - begin);
    for (size_t k = 0; k < depth; ++k) {
      float* row = weights + k * stride;
      decode_floats(w, begin + k, first, first + outputs, bytes, kept, row);
      std::memset(row + outputs, 0, (stride - outputs) * sizeof(float));
    }
    for (size_t j = 0; j < outputs; j += kTurnedOutputs) {
      add_products(task, begin, depth, weights + j, stride, first + j, smaller(kTurnedOutputs, outputs - j));
    }
  }
}

// Outputs at a time of a tile with B = S, whole blocks: what is decoded stays in the second cache, and small.
size_t outer_width(const Task& task) {
  const size_t block = task.weight->layout->block_size;
  return smaller(task.tile_outputs, larger(block, 512 / block * block));
}

// Working memory: kOuterDepth rows of so many outputs, and the bytes and marks of one.
size_t floats_outer_scratch_bytes(const Task& task) {
  const size_t width = outer_width(task);
  return kOuterDepth * round_up(width, kTurnedOutputs) * sizeof(float) + 2 * width;
}

void floats_outer_tile(const Task& task, const Range& outputs, void* scratch) {
  const OuterTile range = outer_tile_of(task, outputs);
  const Task own = task_of(task, range);
  const size_t width = outer_width(task);
  float* weights = static_cast<float*>(scratch);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(weights + kOuterDepth * round_up(width, kTurnedOutputs));
  for (OuterTile piece = range; piece.first < range.last; piece.first = piece.last) {
    piece.last = smaller(piece.first + width, range.last);
    floats_outer_piece(own, piece, weights, bytes, bytes + width);
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
