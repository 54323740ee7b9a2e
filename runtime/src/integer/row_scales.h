// Before the products of a stored row, B = S.T: its scales times those of the activations, and what the activations add
// by the bias of its bytes (Encoding).
#pragma once

#include "decode/decode.h"
#include "simd/vec.h"
#include "simd/vector.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// A row's scales as floats, kLanes from block `block`, then zeros.
inline Vec::Floats row_scales(const Weight& w, size_t row, size_t block) {
  const size_t blocks = w.layout->blocks;
  const uint16_t* scales = w.scales + row * blocks + block;
  if (block + Vec::kLanes <= blocks) return Vec::halves(scales);
  return reinterpret_cast<Vec::Floats>(floats_from_halves(scales, blocks - block, 1));
}

// offsets [m][block_stride]: sums of the activations times minus the bias, for all rows of the segments that hold `row`.
inline void write_offsets(const Task& task, size_t row, float* offsets) {
  const Layout& layout = *task.weight->layout;
  const size_t stride = task.block_stride;
  std::memset(offsets, 0, task.m * stride * sizeof(float));
  for_each_part(layout, row, row + 1, 0, layout.columns, [&](const Part& part) {
    const float bias = layout.segments[part.segment].encoding.bias;
    for (size_t i = 0; i < task.m; ++i) {
      for (size_t block = part.begin / layout.block_size; block < part.end / layout.block_size; ++block) {
        offsets[i * stride + block] = -bias * task.sums[i * stride + block];
      }
    }
  });
}

// Begins the products of stored row `row` with `rows` rows of A from row i on. offsets: see above. products
// [block_stride], `step` further for each row of A. sums: what the offsets add, in lanes; the caller's own, so that they
// stay in registers.
template <size_t rows>
inline void begin_row(const Task& task, size_t i, size_t row, const float* offsets, float* products, size_t step,
                      Vec::Floats (&sums)[rows]) {
  const Weight& w = *task.weight;
  const size_t blocks = w.layout->blocks, stride = task.block_stride;
  for (size_t r = 0; r < rows; ++r) sums[r] = Vec::zero();
  for (size_t block = 0; block < blocks; block += Vec::kLanes) {
    const Vec::Floats scales = row_scales(w, row, block);
    for (size_t r = 0; r < rows; ++r) {
      const size_t place = (i + r) * stride + block;
      sums[r] = Vec::multiply_add(Vec::load_floats(offsets + place), scales, sums[r]);
      Vec::store_floats(products + r * step + block, Vec::multiply(Vec::load_floats(task.scales + place), scales));
    }
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
