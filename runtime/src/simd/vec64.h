// Works on 64 bytes at a time: AVX-512 with BW, VL, VNNI, VBMI and VBMI2.
#pragma once

#include "simd/vec32.h"

namespace fips {
namespace FIPS_ISA {
namespace {

struct Vec64 : VecBase<64> {
  using Half = Vec32;
  static constexpr bool kPlain = false;
  static constexpr size_t kRegisters = 32;
  static constexpr bool kBothSigned = false, kEightBits = true;
  static constexpr bool kExpands = true, kExpands8 = false;

  static Halves LoadN(F16, const uint16_t* p, size_t count) {
    if (count >= kLanes) return LoadU(f16, p);
    const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
    return reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16(mask, p));
  }
  static Bytes LoadDup128(U8, const void* p) {
    return wrap(_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  }
  using VecBase::LoadDup32;
  template <size_t sources>
  static Bytes LoadDup32(U8, const void* p, size_t stride) {
    const auto word = [&](size_t source) { return _mm_loadu_si32(static_cast<const char*>(p) + source * stride); };
    __m512i all = _mm512_broadcastd_epi32(word(0));
    if constexpr (sources == 2) all = _mm512_mask_broadcastd_epi32(all, 0xff00, word(1));
    if constexpr (sources == 4) {
      all = _mm512_mask_broadcastd_epi32(all, 0x00f0, word(1));
      all = _mm512_mask_broadcastd_epi32(all, 0x0f00, word(2));
      all = _mm512_mask_broadcastd_epi32(all, 0xf000, word(3));
    }
    return wrap(all);
  }
  static Bytes AndOr(Bytes a, Bytes b, Bytes o) {
    return wrap(_mm512_ternarylogic_epi64(raw(a), raw(b), raw(o), 0xea));
  }
  static Bytes TableLookupBytes(Bytes table, Bytes index) { return wrap(_mm512_shuffle_epi8(raw(table), raw(index))); }

  static Bytes UnpackPairs(const uint8_t* p, size_t) {
    return wrap(_mm512_srlv_epi64(raw(LoadDup128(u8, p)), _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6)));
  }

  template <int bits>
  static Bytes UnpackChunk(const uint8_t* p, size_t) {
    if constexpr (bits == 8) {
      return LoadU(u8, p);
    } else if constexpr (bits == 4) {
      const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      return And(wrap(_mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4))), Set(u8, 15));
    } else {
      const Bytes low = UnpackPairs(p, 0);
      if constexpr (bits == 2) return And(low, Set(u8, 3));
      int64_t plane;
      std::memcpy(&plane, p + 16, 8);
      // Lane q holds bit q of every byte; it belongs into bit 2.
      const __m512i high = _mm512_rolv_epi64(_mm512_set1_epi64(plane), _mm512_setr_epi64(2, 1, 0, 63, 62, 61, 60, 59));
      return AndOr(wrap(high), Set(u8, 4), And(low, Set(u8, 3)));
    }
  }

  // Where they are: products of field n are 2 ** (bits * n) times as large.
  template <int bits>
  static Bytes UnpackField(Bytes bytes, size_t n) {
    return And(bytes, Set(u8, static_cast<uint8_t>(((1 << bits) - 1) << (bits * n))));
  }
  template <int bits>
  static Ints FieldTotal(Ints total, size_t n) {
    return total >> static_cast<int>(bits * n);
  }

  struct Sum {
    Ints value;
  };
  static constexpr bool kUnlimited = true;
  static constexpr size_t Capacity(int, int) { return ~size_t{0}; }
  static Sum ZeroSum() { return {Zero(i32)}; }
  static void Accumulate(Sum& sum, Bytes u, Bytes s) { sum.value = SumOfMulQuadAccumulate(i32, u, s, sum.value); }
  static Ints Total(Sum sum) { return sum.value; }
  static Ints SumOfMulQuadAccumulate(I32, Bytes u, Bytes s, Ints sum) {
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), raw(u), raw(s)));
  }

  static Floats MulAdd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats PromoteTo(F32, Halves v) { return _mm512_cvtph_ps(reinterpret_cast<__m256i>(v)); }
  static Floats LoadConvert(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static float ReduceSum(F32, Floats v) { return _mm512_reduce_add_ps(v); }
  static int32_t ReduceMax(I32, Ints v) { return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(v)); }

  static void Interleave4(const Bytes (&in)[4], Bytes (&out)[4]) {
    const __m512i ab = _mm512_unpacklo_epi8(raw(in[0]), raw(in[1])), ab2 = _mm512_unpackhi_epi8(raw(in[0]), raw(in[1]));
    const __m512i cd = _mm512_unpacklo_epi8(raw(in[2]), raw(in[3])), cd2 = _mm512_unpackhi_epi8(raw(in[2]), raw(in[3]));
    out[0] = wrap(_mm512_unpacklo_epi16(ab, cd));
    out[1] = wrap(_mm512_unpackhi_epi16(ab, cd));
    out[2] = wrap(_mm512_unpacklo_epi16(ab2, cd2));
    out[3] = wrap(_mm512_unpackhi_epi16(ab2, cd2));
  }

  static void OrderLanes(Floats (&v)[4]) {
    const Floats low = _mm512_shuffle_f32x4(v[0], v[1], 0x44), high = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
    const Floats low2 = _mm512_shuffle_f32x4(v[2], v[3], 0x44), high2 = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_f32x4(low, low2, 0x88);
    v[1] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    v[2] = _mm512_shuffle_f32x4(high, high2, 0x88);
    v[3] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }

  static void Transpose(const uint8_t* rows, size_t stride, uint8_t* out, size_t out_stride) {
    __m512i a[16], b[16];
    for (size_t i = 0; i < 16; ++i) a[i] = raw(LoadU(u8, rows + i * stride));
    for (size_t i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (size_t i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    // a[4 g + c], lane L: rows 4 g … 4 g + 3 of column 4 L + c.
    for (size_t c = 0; c < 4; ++c) {
      const __m512i low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
      const __m512i low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
      const __m512i high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
      const __m512i high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
      StoreU(wrap(_mm512_shuffle_i32x4(low, low2, 0x88)), out + c * out_stride);
      StoreU(wrap(_mm512_shuffle_i32x4(low, low2, 0xdd)), out + (8 + c) * out_stride);
      StoreU(wrap(_mm512_shuffle_i32x4(high, high2, 0x88)), out + (4 + c) * out_stride);
      StoreU(wrap(_mm512_shuffle_i32x4(high, high2, 0xdd)), out + (12 + c) * out_stride);
    }
  }

  // Groups of 4 lanes, those with an even number in one half and the others in another: float16 values, and back.
  static void LoadAlternate(F16, const uint16_t* p, Half::Halves& even, Half::Halves& odd) {
    const __m256i groups = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 0xd8);
    even = reinterpret_cast<Half::Halves>(_mm256_castsi256_si128(groups));
    odd = reinterpret_cast<Half::Halves>(_mm256_extracti128_si256(groups, 1));
  }
  static Floats CombineAlternate(Half::Floats even, Half::Floats odd) {
    const Floats both = _mm512_insertf32x8(_mm512_castps256_ps512(even), odd, 1);
    return _mm512_shuffle_f32x4(both, both, 0xd8);
  }

  // For bitmaps (kExpands).
  static Bytes Set64(U8, uint64_t word) { return wrap(_mm512_set1_epi64(static_cast<long long>(word))); }
  static Bytes LoadN(U8, const void* p, size_t count) {
    return count >= kBytes ? LoadU(u8, p) : wrap(_mm512_maskz_loadu_epi8(low_bits(count), p));
  }
  static void StoreN(Bytes v, void* p, size_t count) { _mm512_mask_storeu_epi8(p, low_bits(count), raw(v)); }
  // Each byte of a table of kBytes by its index.
  static Bytes TableLookupLanes(Bytes table, Bytes index) {
    return wrap(_mm512_permutexvar_epi8(raw(index), raw(table)));
  }
  // From each word of 64 bits, for each of its bytes, 8 bits from bit number shift[byte] on.
  static Bytes MultiShift(Bytes words, Bytes shift) {
    return wrap(_mm512_multishift_epi64_epi8(raw(shift), raw(words)));
  }
  // Where the mask has a bit the next byte of v, else that of `others`.
  static Bytes ExpandOr(Bytes v, uint64_t mask, Bytes others) {
    return wrap(_mm512_mask_expand_epi8(raw(others), mask, raw(v)));
  }
  // Which of kLanes bytes are this value, a bit each; and the next floats of memory where the mask has a bit, else those
  // of `others`.
  static uint32_t EqualLanes(const uint8_t* p, uint8_t value) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(value)));
  }
  static Floats LoadExpandOr(const float* p, uint32_t mask, Floats others) {
    return _mm512_mask_expandloadu_ps(others, static_cast<__mmask16>(mask), p);
  }

 private:
  static __m512i raw(Bytes v) { return reinterpret_cast<__m512i>(v); }
  static Bytes wrap(__m512i v) { return reinterpret_cast<Bytes>(v); }
};

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
