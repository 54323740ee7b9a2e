// Multiplies rounded activations with decoded rows, B = S.T: few rows of them with bitmaps, and layouts that the other
// integer kernels leave.
#pragma once

#include "decode/decoded_rows.h"
#include "simd/vec.h"
#include "task/outputs.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// steps: of a block, if known at compile time, else 0.
template <typename V, size_t rows, size_t steps>
void decoded_rows_kernel(const Task& task, const DecodedRows& decoded, size_t i, size_t first, size_t outputs) {
  const Layout& layout = *task.weight->layout;
  const size_t blocks = layout.blocks, stride = task.block_stride;
  const size_t block_steps = steps ? steps : layout.block_size / V::kBytes;
  typename V::Floats acc[rows][kDotOutputs];
  for (size_t r = 0; r < rows; ++r) {
    const float* sums = task.sums + (i + r) * stride;
    const float* a_scales = task.scales + (i + r) * stride;
    for (size_t j = 0; j < kDotOutputs; ++j) {
      float* products = decoded.products + (r * kDotOutputs + j) * stride;
      typename V::Floats offset = V::Zero(f32);
      for (size_t block = 0; block < blocks; block += V::kLanes) {
        const typename V::Floats scales = V::LoadU(f32, decoded.scales[j] + block);
        const typename V::Floats biases = V::LoadU(f32, decoded.biases[j] + block);
        offset = V::MulAdd(V::Mul(V::LoadU(f32, sums + block), scales), biases, offset);
        V::StoreU(V::Mul(V::LoadU(f32, a_scales + block), scales), products + block);
      }
      acc[r][j] = V::Neg(offset);
    }
  }
  for (size_t block = 0, k = 0; block < blocks; ++block) {
    const int8_t* a = task.block_codes(i, block);
    typename V::Ints sums[rows][kDotOutputs];
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < kDotOutputs; ++j) sums[r][j] = V::Zero(i32);
    }
    for (size_t step = 0; step < block_steps; ++step, k += V::kBytes) {
      typename V::Bytes codes[rows];
      for (size_t r = 0; r < rows; ++r) codes[r] = V::LoadU(u8, a + r * layout.block_size + step * V::kBytes);
      for (size_t j = 0; j < kDotOutputs; ++j) {
        const typename V::Bytes bytes = V::LoadU(u8, decoded.bytes[j] + k);
        for (size_t r = 0; r < rows; ++r) sums[r][j] = V::SumOfMulQuadAccumulate(i32, bytes, codes[r], sums[r][j]);
      }
    }
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < kDotOutputs; ++j) {
        const float scale = decoded.products[(r * kDotOutputs + j) * stride + block];
        acc[r][j] = V::MulAdd(V::ConvertTo(f32, sums[r][j]), V::Set(f32, scale), acc[r][j]);
      }
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t j = 0; j < outputs; ++j) {
      *task.output(i + r, first + j) = V::ReduceSum(f32, acc[r][j]) + bias_of(task, first + j);
    }
  }
}

template <typename V, size_t steps>
void decoded_rows_tile(const Task& task, const Range& range, void* scratch) {
  decoded_tile<kDecodedRows>(task, range, scratch, decoded_rows_kernel<V, kDecodedRows, steps>,
                             decoded_rows_kernel<V, 1, steps>);
}

template <typename V>
void decoded_rows_tile(const Task& task, const Range& range, void* scratch) {
  const size_t steps = task.weight->layout->block_size / V::kBytes;
  return (steps == 1 ? decoded_rows_tile<V, 1> : steps == 2 ? decoded_rows_tile<V, 2> : decoded_rows_tile<V, 0>)(
      task, range, scratch);
}

bool any_decoded_rows_supported(const Layout& layout, size_t) {
  return layout.trans_b && bytes_fit(layout) && !layout.needs_mask() && layout.block_size % Vec::Half::kBytes == 0;
}

size_t any_decoded_rows_scratch_bytes(const Task& task) { return decoded_bytes(*task.weight->layout); }

void any_decoded_rows_tile(const Task& task, const Range& range, void* scratch) {
  const bool whole = task.weight->layout->block_size % Vec::kBytes == 0;
  (whole ? decoded_rows_tile<Vec> : decoded_rows_tile<Vec::Half>)(task, range, scratch);
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
