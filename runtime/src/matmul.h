// Computes a whole product, independent of ONNX Runtime.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "parallel_for.h"

namespace fips {

// y [m, N] = a [m, K] @ B + bias; bias is [N] or null. Throws std::bad_alloc.
void q_matmul(const Weight& weight, const float* a, size_t m, const float* bias, float* y, const Kernels& kernels,
              const ParallelFor& parallel_for);

}  // namespace fips
