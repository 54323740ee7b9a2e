// Computes a whole product, independent of ONNX Runtime.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace fips {

// Runs fn(data, i) for every i below total, in any order, perhaps at once.
struct ParallelFor {
  void (*run)(void* context, size_t total, void (*fn)(void* data, size_t i), void* data);
  void* context;
};

// y [m, N] = a [m, K] @ B + bias; bias is [N] or null. Throws std::bad_alloc.
void q_matmul(const Weight& weight, const float* a, size_t m, const float* bias, float* y, const Kernels& kernels,
              const ParallelFor& parallel_for);

}  // namespace fips
