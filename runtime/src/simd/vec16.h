// 16 bytes at a time: NEON (with dot products where the compiler has them), or plain C++ for every other CPU. The plain
// form says what the members of Vec16, Vec32 and Vec64 mean.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__ARM_NEON) && defined(__aarch64__) && !defined(FIPS_PLAIN)
#include <arm_neon.h>
#endif

#include "simd/common.h"

namespace fips {
namespace FIPS_ISA {
namespace {

#if defined(__ARM_NEON) && defined(__aarch64__) && !defined(FIPS_PLAIN)

struct Vec16 {
  static constexpr size_t kBytes = 16, kLanes = 4;
  static constexpr bool kPlain = false;
  static constexpr size_t kRegisters = 32;
  static constexpr bool kBothSigned = true, kEightBits = false;
  using Bytes = uint8x16_t;
  using Ints = int32x4_t;
  using Floats = float32x4_t;

  static Bytes load(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
  static void store(void* p, Bytes v) { vst1q_u8(static_cast<uint8_t*>(p), v); }
  static Bytes fill(uint8_t value) { return vdupq_n_u8(value); }
  static Bytes repeat16(const void* p) { return load(p); }
  static Bytes repeat4(const void* p) {
    uint32_t word;
    std::memcpy(&word, p, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(word));
  }
  template <size_t>
  static Bytes repeat4(const void* p, size_t) {
    return repeat4(p);
  }
  static Bytes add(Bytes a, Bytes b) { return vaddq_u8(a, b); }
  static Bytes bit_or(Bytes a, Bytes b) { return vorrq_u8(a, b); }
  static Bytes and_or(Bytes a, Bytes b, Bytes c) { return vorrq_u8(vandq_u8(a, b), c); }
  static Bytes select(Bytes table, Bytes index) { return vqtbl1q_u8(table, index); }

  static Bytes pairs(const uint8_t* p, size_t part) {
    return vshlq_u8(load(p), vdupq_n_s8(static_cast<int8_t>(-2 * static_cast<int>(part))));
  }

  template <int bits>
  static Bytes chunk(const uint8_t* p, size_t part) {
    const int first = static_cast<int>(part);
    if constexpr (bits == 8) {
      return load(p + 16 * part);
    } else if constexpr (bits == 4) {
      const Bytes pair = load(p + 16 * (part % 2));
      return part < 2 ? vandq_u8(pair, fill(15)) : vshrq_n_u8(pair, 4);
    } else {
      const Bytes low = vandq_u8(pairs(p, part), fill(3));
      if constexpr (bits == 2) return low;
      const uint8x8_t plane = vld1_u8(p + 16);
      const int8_t left = static_cast<int8_t>(2 - 2 * first);
      const int8x16_t shifts = vcombine_s8(vdup_n_s8(left), vdup_n_s8(static_cast<int8_t>(left - 1)));
      return vorrq_u8(low, vandq_u8(vshlq_u8(vcombine_u8(plane, plane), shifts), fill(4)));
    }
  }

  template <int bits>
  static Bytes field(Bytes bytes, size_t n) {
    const Bytes moved = vshlq_u8(bytes, vdupq_n_s8(static_cast<int8_t>(-bits * static_cast<int>(n))));
    return vandq_u8(moved, fill((1 << bits) - 1));
  }
  template <int bits>
  static Ints field_total(Ints total, size_t) {
    return total;
  }

#if defined(__ARM_FEATURE_DOTPROD)
  // Both signed: u must stay below 128.
  struct Sum {
    int32x4_t value;
  };
  static Sum zero_sum() { return {vdupq_n_s32(0)}; }
  static void add(Sum& sum, Bytes u, Bytes s) {
    sum.value = vdotq_s32(sum.value, vreinterpretq_s8_u8(u), vreinterpretq_s8_u8(s));
  }
  static Ints total(Sum sum) { return sum.value; }
#else
  struct Sum {
    int32x4_t value;
  };
  static Sum zero_sum() { return {vdupq_n_s32(0)}; }
  static void add(Sum& sum, Bytes u, Bytes s) {
    const int8x16_t a = vreinterpretq_s8_u8(u), b = vreinterpretq_s8_u8(s);
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
    sum.value = vaddq_s32(sum.value, vpaddq_s32(low, high));
  }
  static Ints total(Sum sum) { return sum.value; }
#endif
  static constexpr bool kUnlimited = true;
  static constexpr size_t adds(int, int) { return ~size_t{0}; }
  static Ints dot(Ints sum, Bytes u, Bytes s) {
    Sum all{sum};
    add(all, u, s);
    return all.value;
  }
  static Ints zero_ints() { return vdupq_n_s32(0); }
  static Ints add_ints(Ints a, Ints b) { return vaddq_s32(a, b); }
  static Ints shift7(Ints a) { return vshlq_n_s32(a, 7); }

  static Floats zero() { return vdupq_n_f32(0); }
  static Floats set(float value) { return vdupq_n_f32(value); }
  static Floats load_floats(const float* p) { return vld1q_f32(p); }
  static void store_floats(float* p, Floats v) { vst1q_f32(p, v); }
  static Floats as_floats(Bytes v) { return vreinterpretq_f32_u8(v); }
  static Floats floats(Ints v) { return vcvtq_f32_s32(v); }
  static Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static float sum(Floats v) { return vaddvq_f32(v); }

  static void interleave4(const Bytes (&in)[4], Bytes (&out)[4]) {
    const uint16x8_t ab = vreinterpretq_u16_u8(vzip1q_u8(in[0], in[1]));
    const uint16x8_t ab2 = vreinterpretq_u16_u8(vzip2q_u8(in[0], in[1]));
    const uint16x8_t cd = vreinterpretq_u16_u8(vzip1q_u8(in[2], in[3]));
    const uint16x8_t cd2 = vreinterpretq_u16_u8(vzip2q_u8(in[2], in[3]));
    out[0] = vreinterpretq_u8_u16(vzip1q_u16(ab, cd));
    out[1] = vreinterpretq_u8_u16(vzip2q_u16(ab, cd));
    out[2] = vreinterpretq_u8_u16(vzip1q_u16(ab2, cd2));
    out[3] = vreinterpretq_u8_u16(vzip2q_u16(ab2, cd2));
  }

  static void turn_lanes(Floats (&)[4]) {}

  static void transpose(const uint8_t* rows, size_t stride, uint8_t* out, size_t out_stride) {
    for (size_t i = 0; i < 4; ++i) {
      for (size_t c = 0; c < 4; ++c) std::memcpy(out + c * out_stride + 4 * i, rows + i * stride + 4 * c, 4);
    }
  }
};

#else

// In vectors of the compiler, which turns their arithmetic into that of any CPU.
struct Vec16 {
  static constexpr size_t kBytes = 16;              // of Bytes
  static constexpr size_t kLanes = kBytes / 4;      // of Ints and Floats
  static constexpr bool kPlain = true;             // plain C++: code for every block size is large, and no faster
  static constexpr size_t kRegisters = 16;          // how many vectors the CPU holds
  static constexpr bool kBothSigned = false;        // whether sums read their unsigned bytes as signed ones
  static constexpr bool kEightBits = true;          // whether they take unsigned bytes up to 255
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef float Floats __attribute__((vector_size(16)));

  static Bytes load(const void* p) {
    Bytes v;
    std::memcpy(&v, p, kBytes);
    return v;
  }
  static void store(void* p, Bytes v) { std::memcpy(p, &v, kBytes); }
  static Bytes fill(uint8_t value) { return Bytes{} + value; }
  // 16 bytes, or 4, again and again.
  static Bytes repeat16(const void* p) { return load(p); }
  static Bytes repeat4(const void* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return reinterpret_cast<Bytes>(Ints{} + word);
  }
  // 4 bytes from each of p, p + stride, … for an equal part of the vector; no more parts than 16 bytes go into it.
  template <size_t sources>
  static Bytes repeat4(const void* p, size_t) {
    static_assert(sources == 1);
    return repeat4(p);
  }
  static Bytes add(Bytes a, Bytes b) { return a + b; }
  static Bytes bit_or(Bytes a, Bytes b) { return a | b; }
  // (a & b) | c
  static Bytes and_or(Bytes a, Bytes b, Bytes c) { return (a & b) | c; }
  // Each byte of a table of 16 (in wider vectors: of the same 16 bytes of the table) by its index, below 16.
  static Bytes select(Bytes table, Bytes index) {
    uint8_t bytes[kBytes];
    store(bytes, table);
    Bytes result;
    for (size_t i = 0; i < kBytes; ++i) result[i] = bytes[index[i] & 15];
    return result;
  }

  // The lowest two bits of each byte are an integer of a chunk of 2 bits, the others anything.
  static Bytes pairs(const uint8_t* p, size_t part) { return load(p) >> static_cast<uint8_t>(2 * part); }

  // Integers part · kBytes and up of a chunk of 64 of `bits` bits (fips_ort/bits.py), one per byte.
  template <int bits>
  static Bytes chunk(const uint8_t* p, size_t part) {
    if constexpr (bits == 8) {
      return load(p + 16 * part);
    } else if constexpr (bits == 4) {
      return (load(p + 16 * (part % 2)) >> static_cast<uint8_t>(part / 2 * 4)) & 15;
    } else {
      const Bytes low = pairs(p, part) & 3;
      if constexpr (bits == 2) return low;
      uint64_t plane;
      std::memcpy(&plane, p + 16, 8);
      const uint64_t halves[2] = {plane >> (2 * part), plane >> (2 * part + 1)};
      return low | (load(halves) & 1) << 2;
    }
  }

  // Field number n, of `bits` bits, of every byte; and what the sum of its products is, from the sum of what `field` gives.
  template <int bits>
  static Bytes field(Bytes bytes, size_t n) {
    return bytes >> static_cast<uint8_t>(bits * n) & static_cast<uint8_t>((1 << bits) - 1);
  }
  template <int bits>
  static Ints field_total(Ints total, size_t) {
    return total;
  }

  // Sums of products of unsigned and signed bytes: four in each lane.
  struct Sum {
    Ints value;
  };
  // How many products of at most these magnitudes a sum holds before its total must be taken; or no matter how many.
  static constexpr bool kUnlimited = true;
  static constexpr size_t adds(int, int) { return ~size_t{0}; }
  static Sum zero_sum() { return {Ints{}}; }
  static void add(Sum& sum, Bytes u, Bytes s) {
    typedef int16_t Words __attribute__((vector_size(16)));
    typedef uint16_t UnsignedWords __attribute__((vector_size(16)));
    const Words even = reinterpret_cast<Words>(reinterpret_cast<UnsignedWords>(u) & 255) *
                       ((reinterpret_cast<Words>(s) << 8) >> 8);
    const Words odd =
        reinterpret_cast<Words>(reinterpret_cast<UnsignedWords>(u) >> 8) * (reinterpret_cast<Words>(s) >> 8);
    const Ints a = reinterpret_cast<Ints>(even), b = reinterpret_cast<Ints>(odd);
    sum.value += ((a << 16) >> 16) + (a >> 16) + ((b << 16) >> 16) + (b >> 16);
  }
  static Ints total(Sum sum) { return sum.value; }
  // `sum` with such a product added, and no limit.
  static Ints dot(Ints sum, Bytes u, Bytes s) {
    Sum all{sum};
    add(all, u, s);
    return all.value;
  }
  static Ints zero_ints() { return Ints{}; }
  static Ints add_ints(Ints a, Ints b) { return a + b; }
  static Ints shift7(Ints a) { return a * 128; }

  static Floats zero() { return Floats{}; }
  static Floats set(float value) { return Floats{} + value; }
  static Floats load_floats(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store_floats(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
  static Floats as_floats(Bytes v) { return reinterpret_cast<Floats>(v); }
  static Floats floats(Ints v) { return __builtin_convertvector(v, Floats); }
  static Floats multiply(Floats a, Floats b) { return a * b; }
  // a · b + c
  static Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
  // float16 values
  static Floats halves(const uint16_t* p) {
    Floats v;
    for (size_t i = 0; i < kLanes; ++i) v[i] = float_from_half(p[i]);
    return v;
  }
  static float sum(Floats v) { return (v[0] + v[2]) + (v[1] + v[3]); }

  // Four rows of columns → four bytes of every column together: within each 16 columns, out[q] has columns 4 q … 4 q +
  // 3.
  static void interleave4(const Bytes (&in)[4], Bytes (&out)[4]) {
    uint8_t rows[4][kBytes], columns[4 * kBytes];
    for (size_t i = 0; i < 4; ++i) store(rows[i], in[i]);
    for (size_t i = 0; i < 4 * kBytes; ++i) columns[i] = rows[i % 4][i / 4];
    for (size_t q = 0; q < 4; ++q) out[q] = load(columns + q * kBytes);
  }

  // Lanes of four interleaved vectors → in the order of columns: v[i] has columns i · kLanes and up.
  static void turn_lanes(Floats (&)[4]) {}

  // kLanes rows of kBytes → for every 4 columns the 4 bytes of all rows together, one vector every out_stride bytes.
  static void transpose(const uint8_t* rows, size_t stride, uint8_t* out, size_t out_stride) {
    for (size_t i = 0; i < kLanes; ++i) {
      for (size_t c = 0; c < kBytes / 4; ++c) std::memcpy(out + c * out_stride + 4 * i, rows + i * stride + 4 * c, 4);
    }
  }
};

#endif

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
