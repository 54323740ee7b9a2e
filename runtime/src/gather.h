// Looks rows of a dense weight up, independent of ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "parallel_for.h"

namespace fips {

// y [count, columns] = the rows of these numbers. Throws std::invalid_argument for a number that is none of a row.
void q_gather(const Weight& weight, const int64_t* indices, size_t count, float* y, const Kernels& kernels,
              const ParallelFor& parallel_for);

}  // namespace fips
