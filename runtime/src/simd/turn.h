// Turns stored rows to columns, so that the lanes of a vector are outputs.
#pragma once

#include "simd/vec.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kTurnedOutputs = 2 * Vec::kLanes;

// bytes [kTurnedOutputs][size] → for every 4 columns (4 bytes, or a float) the 4 bytes of each output. size: whole
// vectors.
inline void turn(const uint8_t* bytes, size_t size, uint8_t* turned) {
  for (size_t column = 0; column < size; column += Vec::kBytes) {
    for (size_t half = 0; half < 2; ++half) {
      Vec::Transpose(bytes + half * Vec::kLanes * size + column, size,
                     turned + column / 4 * (2 * Vec::kBytes) + half * Vec::kBytes, 2 * Vec::kBytes);
    }
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
