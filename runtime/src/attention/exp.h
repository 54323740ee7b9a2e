// exp of vectors.
#pragma once

#include "simd/vec.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// exp(x) of numbers up to 0, within 2 units in the last place; 0 where that would be subnormal, below -87.6. NaN stays.
// 2^n · exp(r): n is x / ln 2 rounded, r what is left, at most ln 2 / 2; exp(r) by its Taylor polynomial of degree 7.
template <typename V>
inline typename V::Floats exp_of_negative(typename V::Floats x) {
  x = V::Max(x, V::Set(f32, -88.0f));
  // Added to a small number, this leaves the rounded number in the lowest bits.
  const typename V::Floats rounder = V::Set(f32, 0x1.8p23f);
  const typename V::Floats shifted = V::MulAdd(x, V::Set(f32, 0x1.715476p0f), rounder);
  const typename V::Floats n = V::Sub(shifted, rounder);
  // ln 2 in two parts, of which the first times n is exact.
  typename V::Floats r = V::MulAdd(n, V::Set(f32, -0x1.62e4p-1f), x);
  r = V::MulAdd(n, V::Set(f32, -0x1.7f7d1cp-20f), r);
  typename V::Floats sum = V::Set(f32, 1.0f / 5040);
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = V::MulAdd(sum, r, V::Set(f32, factor));
  }
  const typename V::Ints exponent = V::Sub(V::BitCast(i32, shifted), V::Set(i32, 0x4b400000 - 127));
  const typename V::Ints bits = V::template ShiftLeft<23>(V::And(exponent, V::Set(i32, 0xff)));
  return V::Mul(sum, V::BitCast(f32, V::BitCast(u8, bits)));
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
