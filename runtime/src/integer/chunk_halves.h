// Codes of 2, 3 and 4 bits in vectors of 32 bytes, for CPUs with AVX-512: 16 bytes are loaded twice into 32 at no cost, where
// into 64 they take the time of an addition. Fields of bytes are multiplied where they are: one shift serves several, and
// sums of products that are too large by a power of two are shifted afterwards.
#pragma once

#include "simd/vec.h"
#include "weight/weight.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kHalves = 2;

inline __m256i twice(const uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// The codes of a chunk: vector 0 has integers 0 to 15 and 32 to 47 of it, vector 1 the others, kUnit times as large.
template <int bits>
struct HalfLevels {
  static constexpr uint8_t kUnit = bits == 4 ? 1 : 4;

  static void read(const uint8_t* chunk, __m256i (&out)[kHalves]) {
    const __m256i shift = _mm256_setr_epi64x(0, 0, 4, 4);
    if constexpr (bits == 4) {
      for (size_t v = 0; v < kHalves; ++v) {
        out[v] = _mm256_and_si256(_mm256_srlv_epi64(twice(chunk + 16 * v), shift), Vec32::fill(15));
      }
    } else {
      const __m256i low = _mm256_srlv_epi64(twice(chunk), shift);
      out[0] = _mm256_and_si256(low, Vec32::fill(3));
      out[1] = _mm256_and_si256(low, Vec32::fill(12));
    }
    if constexpr (bits == 3) {
      int64_t plane;
      std::memcpy(&plane, chunk + 16, 8);
      // Of vector 0, lane q of 8 bytes has bit 0, 1, 4 or 5 of every byte; it belongs into bit 2.
      const __m256i high = _mm256_rolv_epi64(_mm256_set1_epi64x(plane), _mm256_setr_epi64x(2, 1, 62, 61));
      // out | (high & bit), in the register of `out`: and_or would copy `high`.
      out[0] = _mm256_ternarylogic_epi64(out[0], high, Vec32::fill(4), 0xf8);
      out[1] = _mm256_ternarylogic_epi64(out[1], high, Vec32::fill(16), 0xf8);
    }
  }
};

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips

#endif
