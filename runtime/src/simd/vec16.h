// Holds what vectors of 16 bytes share.
#pragma once

#include "simd/vec_base.h"

namespace fips {
namespace FIPS_ISA {
namespace {

struct Vec16 : VecBase<16> {
  // 16 bytes, again and again.
  static Bytes LoadDup128(U8, const void* p) { return LoadU(u8, p); }
  using VecBase::LoadDup32;
  // 4 bytes from each of p, p + stride, … for an equal part of the vector; no more parts than 16 bytes go into it.
  template <size_t sources>
  static Bytes LoadDup32(U8, const void* p, size_t) {
    static_assert(sources == 1);
    return LoadDup32(u8, p);
  }

  // Lanes of four interleaved vectors → in the order of columns: v[i] has columns i · kLanes and up.
  static void OrderLanes(Floats (&)[4]) {}

  // kLanes rows of kBytes → for every 4 columns the 4 bytes of all rows together, one vector every out_stride bytes.
  static void Transpose(const uint8_t* rows, size_t stride, uint8_t* out, size_t out_stride) {
    for (size_t i = 0; i < kLanes; ++i) {
      for (size_t c = 0; c < kBytes / 4; ++c) std::memcpy(out + c * out_stride + 4 * i, rows + i * stride + 4 * c, 4);
    }
  }
};

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
