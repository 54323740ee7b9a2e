// What kernels leave in their working memory → Y.
#pragma once

#include "common.h"
#include "kernels.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// Outputs [first, first + count) for every row of A from values [m][stride], with the bias.
inline void write_outputs(const Task& task, size_t first, size_t count, const float* values, size_t stride) {
  const size_t n = task.n();
  for (size_t i = 0; i < task.m; ++i) {
    for (size_t j = 0; j < count; ++j) {
      const float bias = task.bias ? task.bias[first + j] : 0.0f;
      task.y[i * n + first + j] = values[i * stride + j] + bias;
    }
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
