// Prepares a head of queries or keys: normalized, rotated by its token's position, scaled.
#pragma once

#include "simd/vec.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// out [size] = factor times the rotation of x [size] · norm / sqrt(mean square of x + epsilon), or, without norm, of
// x.
// cosines, sines [size / 2]: of the angles by which elements i and size / 2 + i are rotated together.
template <typename V>
void prepare_head_with(const float* x, size_t size, const float* norm, float epsilon, const float* cosines,
                  const float* sines, float factor, float* out) {
  const size_t half = size / 2;
  typename V::Floats unit = V::Set(f32, 1.0f);
  if (norm) {
    typename V::Floats squares = V::Zero(f32);
    for (size_t i = 0; i < size; i += V::kLanes) {
      const typename V::Floats value = V::LoadU(f32, x + i);
      squares = V::MulAdd(value, value, squares);
    }
    const float mean = V::ReduceSum(f32, squares) / static_cast<float>(size);
    unit = V::Set(f32, 1.0f / __builtin_sqrtf(mean + epsilon));
  }
  const typename V::Floats scale = V::Set(f32, factor);
  for (size_t i = 0; i < half; i += V::kLanes) {
    typename V::Floats first = V::LoadU(f32, x + i), second = V::LoadU(f32, x + half + i);
    if (norm) {
      first = V::Mul(V::Mul(first, unit), V::LoadU(f32, norm + i));
      second = V::Mul(V::Mul(second, unit), V::LoadU(f32, norm + half + i));
    }
    const typename V::Floats c = V::LoadU(f32, cosines + i), s = V::LoadU(f32, sines + i);
    const typename V::Floats low = V::Sub(V::Mul(first, c), V::Mul(second, s));
    const typename V::Floats high = V::MulAdd(first, s, V::Mul(second, c));
    V::StoreU(V::Mul(low, scale), out + i);
    V::StoreU(V::Mul(high, scale), out + half + i);
  }
}

void prepare_head(const float* x, size_t size, const float* norm, float epsilon, const float* cosines,
                  const float* sines, float factor, float* out) {
  const auto prepare = size % (2 * Vec::kLanes) ? prepare_head_with<Vec::Half> : prepare_head_with<Vec>;
  prepare(x, size, norm, epsilon, cosines, sines, factor, out);
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
