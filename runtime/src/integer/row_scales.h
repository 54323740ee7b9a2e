// Prepares the products of a stored row, B = S.T: its scales times those of the activations, and what the activations
// add by the bias of its bytes (Encoding).
#pragma once

#include "simd/vec.h"
#include "task/task.h"
#include "weight/parts.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// A row's scales as floats, V::kLanes from block `block`, then zeros: what is stored behind the row need not be finite.
template <typename V>
inline typename V::Floats row_scales(const Weight& w, size_t row, size_t block) {
  const size_t blocks = w.layout->blocks;
  return V::PromoteTo(f32, V::LoadN(f16, w.scales + row * blocks + block, blocks - block));
}

// offsets [m][block_stride]: sums of the activations times minus the bias, for all rows of the segments that hold
// `row`.
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

// Begins the products of `outputs` stored rows, the first of them `row`, the next one row_step further, with `rows`
// rows of A from row i on. offsets: see above. products [outputs][block_stride], `step` further for each row of A. sums
// [rows][outputs]: what the offsets add, in lanes; the caller's own, so that they stay in registers.
template <typename V, size_t rows, size_t outputs>
inline void begin_rows(const Task& task, size_t i, size_t row, size_t row_step, const float* offsets, float* products,
                       size_t step, typename V::Floats (&sums)[rows * outputs]) {
  const Weight& w = *task.weight;
  const size_t blocks = w.layout->blocks, stride = task.block_stride;
  for (auto& sum : sums) sum = V::Zero(f32);
  for (size_t block = 0; block < blocks; block += V::kLanes) {
    for (size_t j = 0; j < outputs; ++j) {
      const typename V::Floats scales = row_scales<V>(w, row + j * row_step, block);
      for (size_t r = 0; r < rows; ++r) {
        const size_t place = (i + r) * stride + block;
        typename V::Floats& sum = sums[r * outputs + j];
        sum = V::MulAdd(V::LoadU(f32, offsets + place), scales, sum);
        V::StoreU(V::Mul(V::LoadU(f32, task.scales + place), scales), products + r * step + j * stride + block);
      }
    }
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
