// Prepares the products of a stored row, B = S.T: its scales times those of the activations, and what the activations
// add by the bias of its bytes (Encoding).
#pragma once

#include "simd/vec.h"
#include "task/task.h"
#include "weight/parts.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// offsets [m][block_stride]: sums of the activations times minus the bias, the same for all rows.
inline void write_offsets(const Task& task, float* offsets) {
  const Layout& layout = *task.weight->layout;
  const size_t stride = task.block_stride;
  std::memset(offsets, 0, task.m * stride * sizeof(float));
  for_each_part(layout, 0, 1, 0, layout.columns, [&](const Part& part) {
    const float bias = layout.segments[part.segment].encoding.bias;
    for (size_t i = 0; i < task.m; ++i) {
      for (size_t block = part.begin / layout.block_size; block < part.end / layout.block_size; ++block) {
        offsets[i * stride + block] = -bias * task.sums[i * stride + block];
      }
    }
  });
}

// Begins the products of `outputs` stored rows, the first of them `row`, the next one row_step further, with `rows` rows
// of A from row i on. offsets: see above. products [outputs][block_stride], `step` further for each row of A. sums
// [rows][outputs]: what the offsets add, in lanes.
template <typename V, size_t rows, size_t outputs>
inline void begin_rows(const Task& task, size_t i, size_t row, size_t row_step, const float* offsets, float* products,
                       size_t step, typename V::Floats (&sums)[rows * outputs]) {
  // What is read again and again is in variables of this function: products could be the same memory, so that the
  // compiler would read it anew after every one of them.
  const size_t blocks = task.weight->layout->blocks, stride = task.block_stride;
  const uint16_t* stored = task.weight->scales + row * blocks;
  const float* scales_of_a = task.scales + i * stride;
  offsets += i * stride;
  typename V::Floats acc[rows * outputs];
  for (auto& sum : acc) sum = V::Zero(f32);
  for (size_t block = 0; block < blocks; block += V::kLanes) {
    typename V::Floats offset[rows], a_scales[rows];
    for (size_t r = 0; r < rows; ++r) {
      offset[r] = V::LoadU(f32, offsets + r * stride + block);
      a_scales[r] = V::LoadU(f32, scales_of_a + r * stride + block);
    }
    for (size_t j = 0; j < outputs; ++j) {
      // No further than the row's end: a scale there need not be finite.
      const uint16_t* halves = stored + j * row_step * blocks + block;
      const typename V::Floats scales = V::PromoteTo(f32, V::LoadN(f16, halves, blocks - block));
      for (size_t r = 0; r < rows; ++r) {
        acc[r * outputs + j] = V::MulAdd(offset[r], scales, acc[r * outputs + j]);
        V::StoreU(V::Mul(a_scales[r], scales), products + r * step + j * stride + block);
      }
    }
  }
  for (size_t n = 0; n < rows * outputs; ++n) sums[n] = acc[n];
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
