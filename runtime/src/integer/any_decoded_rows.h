// Rounded activations times decoded rows, B = S.T: few rows of them with bitmaps, and layouts that the other integer
// kernels leave.
#pragma once

#include "decode/decoded_rows.h"
#include "simd/vec.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// steps: of a block, if known at compile time, else 0.
template <typename V, size_t rows, size_t steps>
void integer_row_kernel(const Task& task, const DecodedRows& decoded, size_t i, size_t first, size_t outputs) {
  const Layout& layout = *task.weight->layout;
  const size_t blocks = layout.blocks, stride = task.block_stride;
  const size_t block_steps = steps ? steps : layout.block_size / V::kBytes;
  typename V::Floats acc[rows][kDotOutputs];
  for (size_t r = 0; r < rows; ++r) {
    const float* sums = task.sums + (i + r) * stride;
    const float* a_scales = task.scales + (i + r) * stride;
    for (size_t j = 0; j < kDotOutputs; ++j) {
      float* products = decoded.products + (r * kDotOutputs + j) * stride;
      typename V::Floats offset = V::zero();
      for (size_t block = 0; block < blocks; block += V::kLanes) {
        const typename V::Floats scales = V::load_floats(decoded.scales[j] + block);
        const typename V::Floats biases = V::load_floats(decoded.biases[j] + block);
        offset = V::multiply_add(V::multiply(V::load_floats(sums + block), scales), biases, offset);
        V::store_floats(products + block, V::multiply(V::load_floats(a_scales + block), scales));
      }
      acc[r][j] = V::multiply(offset, V::set(-1.0f));
    }
  }
  for (size_t block = 0, k = 0; block < blocks; ++block) {
    const int8_t* a = task.block_codes(i, block);
    typename V::Ints sums[rows][kDotOutputs];
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < kDotOutputs; ++j) sums[r][j] = V::zero_ints();
    }
    for (size_t step = 0; step < block_steps; ++step, k += V::kBytes) {
      typename V::Bytes codes[rows];
      for (size_t r = 0; r < rows; ++r) codes[r] = V::load(a + r * layout.block_size + step * V::kBytes);
      for (size_t j = 0; j < kDotOutputs; ++j) {
        const typename V::Bytes bytes = V::load(decoded.bytes[j] + k);
        for (size_t r = 0; r < rows; ++r) sums[r][j] = V::dot(sums[r][j], bytes, codes[r]);
      }
    }
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < kDotOutputs; ++j) {
        const float scale = decoded.products[(r * kDotOutputs + j) * stride + block];
        acc[r][j] = V::multiply_add(V::floats(sums[r][j]), V::set(scale), acc[r][j]);
      }
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t j = 0; j < outputs; ++j) {
      const float bias = task.bias ? task.bias[first + j] : 0.0f;
      task.y[(i + r) * layout.rows + first + j] = V::sum(acc[r][j]) + bias;
    }
  }
}

template <typename V, size_t steps>
void integer_row_tile(const Task& task, size_t tile, void* scratch) {
  decoded_tile<kDecodedRows>(task, tile, scratch, integer_row_kernel<V, kDecodedRows, steps>,
                             integer_row_kernel<V, 1, steps>);
}

template <typename V>
void integer_row_tile(const Task& task, size_t tile, void* scratch) {
  const size_t steps = task.weight->layout->block_size / V::kBytes;
  return (steps == 1 ? integer_row_tile<V, 1> : steps == 2 ? integer_row_tile<V, 2> : integer_row_tile<V, 0>)(
      task, tile, scratch);
}

void integer_rows(const Task& task, size_t tile, void* scratch) {
#if defined(__AVX512VBMI__)
  if (task.weight->layout->block_size % Vec64::kBytes) return integer_row_tile<Vec32>(task, tile, scratch);
#endif
  integer_row_tile<Vec>(task, tile, scratch);
}

bool rows_supported(const Layout& layout, size_t) {
  return layout.trans_b && bytes_fit(layout) && !layout.needs_mask() && layout.block_size % smaller(32, Vec::kBytes) == 0;
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
