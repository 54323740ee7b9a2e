// Floats as vectors of the compiler, which turns their arithmetic into that of any CPU.
#pragma once

#include "simd/common.h"

namespace fips {
namespace FIPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr size_t kVectorBytes = 64;
constexpr size_t kOuterRows = 12;       // rows of A held in registers by the outer-product kernel
constexpr size_t kDirectRows = 4;       // up to which weights are not decoded to a buffer of floats
constexpr size_t kDirectDotRows = 2;    // of them in registers
constexpr size_t kDirectOuterRows = 4;
#elif defined(__AVX2__)
constexpr size_t kVectorBytes = 32;
constexpr size_t kOuterRows = 6;
constexpr size_t kDirectRows = 4;
constexpr size_t kDirectDotRows = 1;
constexpr size_t kDirectOuterRows = 2;
#else
constexpr size_t kVectorBytes = 16;
constexpr size_t kOuterRows = 4;
constexpr size_t kDirectRows = 0;       // without instructions from bytes to floats the buffer is faster
constexpr size_t kDirectDotRows = 1;
constexpr size_t kDirectOuterRows = 2;
#endif
constexpr size_t kLanes = kVectorBytes / sizeof(float);
constexpr size_t kDotOutputs = 4;                // outputs per step of the dot-product kernels
constexpr size_t kOuterOutputs = 2 * kLanes;     // of the outer-product kernel
constexpr size_t kDepth = 256;                   // wanted length of sums over columns between additions to Y
constexpr size_t kOuterDepth = 64;               // same over rows

typedef float Vector __attribute__((vector_size(kVectorBytes)));

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

inline float sum_lanes(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float lanes[kLanes];
  store(lanes, v);
  for (size_t half = kLanes / 2; half; half /= 2) {
    for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}

// The largest lane of a vector of int32.
template <typename Integers>
inline int32_t max_lanes(Integers v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(v));
#else
  int32_t lanes[kLanes];
  std::memcpy(lanes, &v, sizeof lanes);
  for (size_t half = kLanes / 2; half; half /= 2) {
    for (size_t i = 0; i < half; ++i) lanes[i] = lanes[i] < lanes[i + half] ? lanes[i + half] : lanes[i];
  }
  return lanes[0];
#endif
}

// The first `count` halves, `step` apart, as floats, then zeros.
inline Vector floats_from_halves(const uint16_t* halves, size_t count, size_t step) {
  if (step > 1) {
    Vector floats = {};
    for (size_t i = 0; i < smaller(count, kLanes); ++i) floats[i] = float_from_half(halves[i * step]);
    return floats;
  }
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << smaller(count, 16)) - 1);
  return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, halves)));
#else
  Vector floats = {};
  for (size_t i = 0; i < smaller(count, kLanes); ++i) floats[i] = float_from_half(halves[i]);
  return floats;
#endif
}

inline Vector broadcast(float value) { return Vector{} + value; }

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
