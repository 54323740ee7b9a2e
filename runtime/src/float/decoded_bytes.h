// Multiplies few rows of float32 activations (accuracy_level 0) with weights that are decoded to bytes, which become
// floats in registers.
#pragma once

#include "decode/decode.h"
#include "decode/decoded_rows.h"
#include "simd/vec.h"
#include "task/outer_tile.h"
#include "task/outputs.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// Up to so many rows of A. Without instructions from bytes to floats a buffer of floats (decoded_floats.h) is faster.
constexpr size_t kBytesRows = Vec::kBytes > 16 ? 4 : 0;
// Of them in registers, for B = S.T and for B = S.
constexpr size_t kBytesDotRows = Vec::kBytes == 64 ? 2 : 1;
constexpr size_t kBytesOuterRows = Vec::kBytes == 64 ? 4 : 2;

bool bytes_supported(const Layout& layout, size_t m) {
  return m <= kBytesRows && !layout.needs_mask() && layout.block_size % Vec::kLanes == 0;
}

bool bytes_dot_supported(const Layout& layout, size_t m) { return layout.trans_b && bytes_supported(layout, m); }

bool bytes_outer_supported(const Layout& layout, size_t m) { return !layout.trans_b && bytes_supported(layout, m); }

// B = S.T
template <size_t rows>
void bytes_dot_kernel(const Task& task, const DecodedRows& decoded, size_t i, size_t first, size_t outputs) {
  const Layout& layout = *task.weight->layout;
  Vec::Floats acc[rows][kDotOutputs] = {};
  for (size_t block = 0; block < layout.blocks; ++block) {
    Vec::Floats sums[rows][kDotOutputs] = {};
    const size_t end = (block + 1) * layout.block_size;
    for (size_t k = block * layout.block_size; k < end; k += Vec::kLanes) {
      Vec::Floats x[rows];
      for (size_t r = 0; r < rows; ++r) x[r] = Vec::LoadU(f32, task.a + (i + r) * task.k() + k);
      for (size_t j = 0; j < kDotOutputs; ++j) {
        const Vec::Floats bias = Vec::Set(f32, decoded.biases[j][block]);
        const Vec::Floats weights = Vec::Sub(Vec::LoadConvert(decoded.bytes[j] + k), bias);
        for (size_t r = 0; r < rows; ++r) sums[r][j] = Vec::MulAdd(x[r], weights, sums[r][j]);
      }
    }
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < kDotOutputs; ++j) {
        acc[r][j] = Vec::MulAdd(sums[r][j], Vec::Set(f32, decoded.scales[j][block]), acc[r][j]);
      }
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t j = 0; j < outputs; ++j) {
      *task.output(i + r, first + j) = Vec::ReduceSum(f32, acc[r][j]) + bias_of(task, first + j);
    }
  }
}

size_t bytes_dot_scratch_bytes(const Task& task) { return decoded_bytes(*task.weight->layout); }

void bytes_dot_tile(const Task& task, const Range& range, void* scratch) {
  decoded_tile<kBytesDotRows>(task, range, scratch, bytes_dot_kernel<kBytesDotRows>, bytes_dot_kernel<1>);
}

// B = S: y[i][j] += sum over the part's rows k of a[i][k] * scales[k] * (bytes[k][j] - bias), for `vectors` vectors of
// columns of one block.
template <size_t rows, size_t vectors>
void bytes_outer_kernel(const float* a, size_t a_stride, const uint8_t* bytes, size_t stride, const float* scales,
                         float bias, size_t depth, float* y, size_t y_stride) {
  Vec::Floats acc[rows][vectors] = {};
  for (size_t k = 0; k < depth; ++k) {
    Vec::Floats weights[vectors];
    for (size_t v = 0; v < vectors; ++v) {
      weights[v] = Vec::Sub(Vec::LoadConvert(bytes + k * stride + v * Vec::kLanes), Vec::Set(f32, bias));
    }
    for (size_t i = 0; i < rows; ++i) {
      const Vec::Floats x = Vec::Set(f32, a[i * a_stride + k] * scales[k]);
      for (size_t v = 0; v < vectors; ++v) acc[i][v] = Vec::MulAdd(x, weights[v], acc[i][v]);
    }
  }
  for (size_t i = 0; i < rows; ++i) {
    for (size_t v = 0; v < vectors; ++v) {
      float* out = y + i * y_stride + v * Vec::kLanes;
      Vec::StoreU(Vec::Add(Vec::LoadU(f32, out), acc[i][v]), out);
    }
  }
}

void bytes_outer_range(const Task& task, const OuterTile& range, uint8_t* bytes) {
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
          const bool wide = block + layout.block_size - j >= kVectors * Vec::kLanes;
          for (size_t i = 0; i < task.m;) {
            const bool full = task.m - i >= kBytesOuterRows;
            const auto kernel = full ? (wide ? bytes_outer_kernel<kBytesOuterRows, kVectors>
                                             : bytes_outer_kernel<kBytesOuterRows, 1>)
                                     : (wide ? bytes_outer_kernel<1, kVectors> : bytes_outer_kernel<1, 1>);
            kernel(task.a + i * task.k() + part.row_begin, task.k(), bytes + (j - part.begin), stride, scales,
                   e.bias, depth, task.y + i * n + j, n);
            i += full ? kBytesOuterRows : 1;
          }
          j += wide ? kVectors * Vec::kLanes : Vec::kLanes;
        }
      }
    });
  }
}

size_t bytes_outer_scratch_bytes(const Task& task) { return kOuterDepth * task.tile_outputs; }

void bytes_outer_tile(const Task& task, const Range& outputs, void* scratch) {
  const OuterTile range = outer_tile_of(task, outputs);
  bytes_outer_range(task_of(task, range), range, static_cast<uint8_t*>(scratch));
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
