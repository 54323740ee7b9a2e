// Holds the steps of rounding floats to integers that quantize.h and dense_outer.h share, and the magnitude of
// activations, which also decides how matmul.cpp multiplies them.
#pragma once

#include "simd/vec.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// Adding 1.5 · 2^23 leaves the nearest integer, half to even, in the lowest bits; these are the float and its bits.
constexpr float kRounder = 12582912.0f;
constexpr int32_t kRounderBits = 0x4b400000;

// Without their sign, floats are ordered as their bits are as integers; infinities and NaNs come last.
constexpr int32_t kSignless = 0x7fffffff;
constexpr int32_t kInfinity = 0x7f800000;

// The largest magnitude of `count` values, as bits.
inline int32_t largest_magnitude(const float* values, size_t count) {
  const size_t whole = count / Vec::kLanes * Vec::kLanes;
  Vec::Ints largest = Vec::Zero(i32);
  for (size_t k = 0; k < whole; k += Vec::kLanes) {
    const Vec::Ints magnitude = Vec::And(Vec::BitCast(i32, Vec::LoadU(f32, values + k)), Vec::Set(i32, kSignless));
    largest = Vec::Max(magnitude, largest);
  }
  int32_t result = Vec::ReduceMax(i32, largest);
  for (size_t k = whole; k < count; ++k) {
    int32_t magnitude;
    std::memcpy(&magnitude, values + k, sizeof magnitude);
    magnitude &= kSignless;
    result = result < magnitude ? magnitude : result;
  }
  return result;
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
