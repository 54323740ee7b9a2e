// Reads codes of 2, 3 and 4 bits into vectors of half the size, on CPUs with AVX-512: 16 bytes are loaded twice into 32
// at no cost, where into 64 they take the time of an addition. Fields of bytes are multiplied where they are: one shift
// serves several, and sums of products that are too large by a power of two are shifted afterwards.
#pragma once

#include "simd/vec.h"
#include "weight/weight.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr bool kUseHalves = Vec::kBytes == 64;
constexpr size_t kHalves = 2;

// The codes of a chunk: vector 0 has integers 0 to 15 and 32 to 47 of it, vector 1 the others, kUnit times as large.
// V: Vec::Half, if kUseHalves.
template <typename V, int bits>
struct HalfLevels {
  static constexpr uint8_t kUnit = bits == 4 ? 1 : 4;

  static void read(const uint8_t* chunk, typename V::Bytes (&out)[kHalves]) {
    if constexpr (bits == 4) {
      for (size_t v = 0; v < kHalves; ++v) {
        out[v] = V::And(V::template ShiftRight64<0, 0, 4, 4>(V::LoadDup128(u8, chunk + 16 * v)), V::Set(u8, 15));
      }
    } else {
      const typename V::Bytes low = V::template ShiftRight64<0, 0, 4, 4>(V::LoadDup128(u8, chunk));
      out[0] = V::And(low, V::Set(u8, 3));
      out[1] = V::And(low, V::Set(u8, 12));
    }
    if constexpr (bits == 3) {
      uint64_t plane;
      std::memcpy(&plane, chunk + 16, 8);
      // Of vector 0, lane q of 8 bytes has bit 0, 1, 4 or 5 of every byte; it belongs into bit 2.
      const typename V::Bytes high = V::template RotateLeft64<2, 1, 62, 61>(V::Set64(u8, plane));
      out[0] = V::OrAnd(out[0], high, V::Set(u8, 4));
      out[1] = V::OrAnd(out[1], high, V::Set(u8, 16));
    }
  }
};

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
