// Rounding of activations to integers, in blocks (fips_ort/reference.py).
#pragma once

#include <cmath>

#include "simd/vector.h"

namespace fips {
namespace FIPS_ISA {
namespace {

void quantize_block(const float* a, size_t size, int8_t* codes, float* scale, float* sum) {
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef int8_t Narrow __attribute__((vector_size(kLanes)));
  const size_t whole = size / kLanes * kLanes;
  // Without their sign, floats are ordered as their bits are as integers; infinities and NaNs come last.
  Integers largest = {};
  for (size_t k = 0; k < whole; k += kLanes) {
    const Integers magnitude = reinterpret_cast<Integers>(load(a + k)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t bits = max_lanes(largest);
  for (size_t k = whole; k < size; ++k) {
    int32_t magnitude;
    std::memcpy(&magnitude, a + k, 4);
    magnitude &= 0x7fffffff;
    bits = bits < magnitude ? magnitude : bits;
  }
  if (bits >= 0x7f800000) {
    std::memset(codes, 0, size);
    *scale = *sum = NAN;
    return;
  }
  float maximum;
  std::memcpy(&maximum, &bits, 4);
  *scale = maximum / 127.0f;
  const float divisor = *scale > 0.0f ? *scale : 1.0f;
  // Adding and taking away 1.5 · 2^23 rounds to an integer, half to even.
  Vector sums = {};
  for (size_t k = 0; k < whole; k += kLanes) {
    const Vector shifted = load(a + k) / divisor + 12582912.0f;
    const Narrow code = __builtin_convertvector(reinterpret_cast<Integers>(shifted) - 0x4b400000, Narrow);
    std::memcpy(codes + k, &code, kLanes);
    sums += shifted - 12582912.0f;
  }
  float all = sum_lanes(sums);  // of integers: exact
  for (size_t k = whole; k < size; ++k) {
    const float code = (a[k] / divisor + 12582912.0f) - 12582912.0f;
    codes[k] = static_cast<int8_t>(code);
    all += code;
  }
  *sum = *scale * all;
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
