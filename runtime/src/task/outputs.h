// Writes outputs from what kernels leave in their working memory.
#pragma once

#include "simd/vec.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

inline float bias_of(const Task& task, size_t output) { return task.bias ? task.bias[output] : 0.0f; }

// The bias, or 0, to outputs [first, first + count) of every row of A.
inline void start_outputs(const Task& task, size_t first, size_t count) {
  for (size_t i = 0; i < task.m; ++i) {
    for (size_t j = first; j < first + count; ++j) *task.output(i, j) = bias_of(task, j);
  }
}

// Outputs [first, first + count) for every row of A from values [m][stride], with the bias.
inline void write_outputs(const Task& task, size_t first, size_t count, const float* values, size_t stride) {
  for (size_t i = 0; i < task.m; ++i) {
    float* y = task.output(i, first);
    for (size_t j = 0; j < count; ++j) y[j] = values[i * stride + j] + bias_of(task, first + j);
  }
}

// y [size] = the sum of parts [count, size].
void add_parts(const float* parts, size_t count, size_t size, float* y) {
  size_t j = 0;
  for (; j + Vec::kLanes <= size; j += Vec::kLanes) {
    Vec::Floats sum = Vec::LoadU(f32, parts + j);
    for (size_t part = 1; part < count; ++part) sum = Vec::Add(sum, Vec::LoadU(f32, parts + part * size + j));
    Vec::StoreU(sum, y + j);
  }
  for (; j < size; ++j) {
    y[j] = parts[j];
    for (size_t part = 1; part < count; ++part) y[j] += parts[part * size + j];
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
