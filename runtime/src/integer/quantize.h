// Rounds activations to integers, in blocks (fips_ort/reference.py).
#pragma once

#include <cmath>

#include "integer/rounding.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr float kSmall = 0x1p-64f, kLift = 0x1p64f;

void quantize_block(const float* a, size_t size, int8_t* codes, float* scale, float* sum) {
  const size_t whole = size / Vec::kLanes * Vec::kLanes;
  const int32_t bits = largest_magnitude(a, size);
  if (bits >= kInfinity) {
    std::memset(codes, 0, size);
    *scale = *sum = NAN;
    return;
  }
  float maximum;
  std::memcpy(&maximum, &bits, 4);
  // A scale below the normal floats has few bits: divided by it, activations could exceed 127.
  const float lift = maximum < kSmall ? kLift : 1.0f;
  const float lifted = maximum * lift / 127.0f, divisor = lifted > 0.0f ? lifted : 1.0f;
  *scale = lifted / lift;
  const Vec::Floats shift = Vec::Set(f32, kRounder);
  Vec::Floats sums = Vec::Zero(f32);
  for (size_t k = 0; k < whole; k += Vec::kLanes) {
    const Vec::Floats value = Vec::Mul(Vec::LoadU(f32, a + k), Vec::Set(f32, lift));
    const Vec::Floats shifted = Vec::Add(Vec::Div(value, Vec::Set(f32, divisor)), shift);
    const Vec::Ints code = Vec::Sub(Vec::BitCast(i32, shifted), Vec::Set(i32, kRounderBits));
    Vec::StoreU(Vec::DemoteTo(i8_lane, code), codes + k);
    sums = Vec::Add(sums, Vec::Sub(shifted, shift));
  }
  float all = Vec::ReduceSum(f32, sums);  // of integers: exact
  for (size_t k = whole; k < size; ++k) {
    const float code = (a[k] * lift / divisor + kRounder) - kRounder;
    codes[k] = static_cast<int8_t>(code);
    all += code;
  }
  *sum = *scale * all;
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
