// Rounds activations to integers, in blocks (fips_ort/reference.py).
#pragma once

#include <cmath>

#include "integer/rounding.h"

namespace fips {
namespace FIPS_ISA {
namespace {

void quantize_block(const float* a, size_t size, int8_t* codes, float* scale, float* sum) {
  const size_t whole = size / Vec::kLanes * Vec::kLanes;
  int32_t bits = largest_magnitude(a, whole);
  for (size_t k = whole; k < size; ++k) {
    int32_t magnitude;
    std::memcpy(&magnitude, a + k, 4);
    magnitude &= kSignless;
    bits = bits < magnitude ? magnitude : bits;
  }
  if (bits >= kInfinity) {
    std::memset(codes, 0, size);
    *scale = *sum = NAN;
    return;
  }
  float maximum;
  std::memcpy(&maximum, &bits, 4);
  *scale = maximum / 127.0f;
  const float divisor = *scale > 0.0f ? *scale : 1.0f;
  const Vec::Floats shift = Vec::Set(f32, kRounder);
  Vec::Floats sums = Vec::Zero(f32);
  for (size_t k = 0; k < whole; k += Vec::kLanes) {
    const Vec::Floats shifted = Vec::Add(Vec::Div(Vec::LoadU(f32, a + k), Vec::Set(f32, divisor)), shift);
    const Vec::Ints code = Vec::Sub(Vec::BitCast(i32, shifted), Vec::Set(i32, kRounderBits));
    Vec::StoreU(Vec::DemoteTo(i8_lane, code), codes + k);
    sums = Vec::Add(sums, Vec::Sub(shifted, shift));
  }
  float all = Vec::ReduceSum(f32, sums);  // of integers: exact
  for (size_t k = whole; k < size; ++k) {
    const float code = (a[k] / divisor + kRounder) - kRounder;
    codes[k] = static_cast<int8_t>(code);
    all += code;
  }
  *sum = *scale * all;
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
