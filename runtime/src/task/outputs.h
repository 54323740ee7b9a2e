// What kernels leave in their working memory → Y.
#pragma once

#include "simd/vector.h"
#include "task/task.h"

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

// y [size] = the sum of parts [count, size].
void add_parts(const float* parts, size_t count, size_t size, float* y) {
  size_t j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    Vector sum = load(parts + j);
    for (size_t part = 1; part < count; ++part) sum += load(parts + part * size + j);
    store(y + j, sum);
  }
  for (; j < size; ++j) {
    y[j] = parts[j];
    for (size_t part = 1; part < count; ++part) y[j] += parts[part * size + j];
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
