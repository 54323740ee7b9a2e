// Works on 16 bytes at a time: NEON, with dot products where the compiler has them.
#pragma once

#include <arm_neon.h>

#include "simd/vec16.h"

namespace fips {
namespace FIPS_ISA {
namespace {

struct NeonVec : Vec16 {
  using Half = NeonVec;
  static constexpr bool kPlain = false;
  static constexpr size_t kRegisters = 32;
  static constexpr bool kBothSigned = true, kEightBits = false;
  static constexpr bool kExpands = false, kExpands8 = true;

  static Bytes TableLookupBytes(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }

  static void ExpandOr8(const uint8_t* bytes, const uint8_t* places, uint64_t absent, uint8_t* out) {
    const uint8x16_t next = vcombine_u8(vld1_u8(bytes), vdup_n_u8(0));
    vst1_u8(out, vqtbx1_u8(vcreate_u8(absent), next, vld1_u8(places)));
  }

  static Bytes UnpackPairs(const uint8_t* p, size_t v) {
    return vshlq_u8(LoadU(u8, p), vdupq_n_s8(static_cast<int8_t>(-2 * static_cast<int>(v))));
  }

  template <int bits>
  static Bytes UnpackChunk(const uint8_t* p, size_t v) {
    if constexpr (bits == 8) {
      return LoadU(u8, p + 16 * v);
    } else if constexpr (bits == 4) {
      const Bytes pair = LoadU(u8, p + 16 * (v % 2));
      return v < 2 ? And(pair, Set(u8, 15)) : Bytes(vshrq_n_u8(pair, 4));
    } else {
      const Bytes low = And(UnpackPairs(p, v), Set(u8, 3));
      if constexpr (bits == 2) return low;
      const uint8x8_t plane = vld1_u8(p + 16);
      const int8_t left = static_cast<int8_t>(2 - 2 * static_cast<int>(v));
      const int8x16_t shifts = vcombine_s8(vdup_n_s8(left), vdup_n_s8(static_cast<int8_t>(left - 1)));
      return Or(low, And(vshlq_u8(vcombine_u8(plane, plane), shifts), Set(u8, 4)));
    }
  }

  template <int bits>
  static Bytes UnpackField(Bytes bytes, size_t n) {
    const Bytes moved = vshlq_u8(bytes, vdupq_n_s8(static_cast<int8_t>(-bits * static_cast<int>(n))));
    return And(moved, Set(u8, (1 << bits) - 1));
  }

  // Both signed: u must stay below 128.
  struct Sum {
    Ints value;
  };
  static constexpr bool kUnlimited = true;
  static constexpr size_t Capacity(int, int) { return ~size_t{0}; }
  static Sum ZeroSum() { return {Zero(i32)}; }
  static void Accumulate(Sum& sum, Bytes u, Bytes s) {
    const int8x16_t a = vreinterpretq_s8_u8(u), b = vreinterpretq_s8_u8(s);
#if defined(__ARM_FEATURE_DOTPROD)
    sum.value = vdotq_s32(sum.value, a, b);
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
    sum.value = vaddq_s32(sum.value, vpaddq_s32(low, high));
#endif
  }
  static Ints Total(Sum sum) { return sum.value; }
  static Ints SumOfMulQuadAccumulate(I32, Bytes u, Bytes s, Ints sum) {
    Sum all{sum};
    Accumulate(all, u, s);
    return all.value;
  }

  static Floats MulAdd(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats PromoteTo(F32, Halves v) { return vcvt_f32_f16(vreinterpret_f16_u16(v)); }
  static float ReduceSum(F32, Floats v) { return vaddvq_f32(v); }

  static void Interleave4(const Bytes (&in)[4], Bytes (&out)[4]) {
    const uint16x8_t ab = vreinterpretq_u16_u8(vzip1q_u8(in[0], in[1]));
    const uint16x8_t ab2 = vreinterpretq_u16_u8(vzip2q_u8(in[0], in[1]));
    const uint16x8_t cd = vreinterpretq_u16_u8(vzip1q_u8(in[2], in[3]));
    const uint16x8_t cd2 = vreinterpretq_u16_u8(vzip2q_u8(in[2], in[3]));
    out[0] = vreinterpretq_u8_u16(vzip1q_u16(ab, cd));
    out[1] = vreinterpretq_u8_u16(vzip2q_u16(ab, cd));
    out[2] = vreinterpretq_u8_u16(vzip1q_u16(ab2, cd2));
    out[3] = vreinterpretq_u8_u16(vzip2q_u16(ab2, cd2));
  }
};

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
