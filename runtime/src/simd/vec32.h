// Works on 32 bytes at a time: AVX2 with FMA and F16C, and what AVX-512 adds to vectors of this size where the compiler
// has it.
#pragma once

#include <immintrin.h>

#include "simd/vec_base.h"

namespace fips {
namespace FIPS_ISA {
namespace {

struct Vec32 : VecBase<32> {
  using Half = Vec32;
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  static constexpr bool kAvx512 = true;
#else
  static constexpr bool kAvx512 = false;
#endif
  static constexpr bool kPlain = false;
  static constexpr size_t kRegisters = kAvx512 ? 32 : 16;
  static constexpr bool kBothSigned = false, kEightBits = kAvx512;
  static constexpr bool kExpands = false, kExpands8 = true;

  static Bytes LoadDup128(U8, const void* p) {
    return wrap(_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  }
  using VecBase::LoadDup32;
  template <size_t sources>
  static Bytes LoadDup32(U8, const void* p, size_t stride) {
    const Bytes first = LoadDup32(u8, p);
    if constexpr (sources == 1) return first;
    return wrap(_mm256_blend_epi32(raw(first), raw(LoadDup32(u8, static_cast<const char*>(p) + stride)), 0xf0));
  }
#if defined(__AVX512VL__)
  static Bytes AndOr(Bytes a, Bytes b, Bytes o) {
    return wrap(_mm256_ternarylogic_epi64(raw(a), raw(b), raw(o), 0xea));
  }
  // The same in the register of o.
  static Bytes OrAnd(Bytes o, Bytes a, Bytes b) {
    return wrap(_mm256_ternarylogic_epi64(raw(o), raw(a), raw(b), 0xf8));
  }
  static Halves LoadN(F16, const uint16_t* p, size_t count) {
    const __mmask8 mask = static_cast<__mmask8>((1u << smaller(count, kLanes)) - 1);
    return reinterpret_cast<Halves>(_mm_maskz_loadu_epi16(mask, p));
  }
#endif
  static Bytes TableLookupBytes(Bytes table, Bytes index) { return wrap(_mm256_shuffle_epi8(raw(table), raw(index))); }

  static void ExpandOr8(const uint8_t* bytes, const uint8_t* places, uint64_t absent, uint8_t* out) {
    const __m128i index = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places));
    const __m128i taken = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)), index);
    const __m128i others = _mm_set1_epi64x(static_cast<long long>(absent));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_blendv_epi8(taken, others, index));
  }

  static Bytes UnpackPairs(const uint8_t* p, size_t v) {
    const long long first = 4 * static_cast<long long>(v);
    return wrap(_mm256_srlv_epi64(raw(LoadDup128(u8, p)), _mm256_setr_epi64x(first, first, first + 2, first + 2)));
  }

  template <int bits>
  static Bytes UnpackChunk(const uint8_t* p, size_t v) {
    if constexpr (bits == 8) {
      return LoadU(u8, p + 32 * v);
    } else if constexpr (bits == 4) {
      const Bytes pair = LoadU(u8, p);
      return And(v ? wrap(_mm256_srli_epi16(raw(pair), 4)) : pair, Set(u8, 15));
    } else {
      const Bytes low = And(UnpackPairs(p, v), Set(u8, 3));
      if constexpr (bits == 2) return low;
      long long plane;
      std::memcpy(&plane, p + 16, 8);
      // Lane q holds bit 4 v + q of every byte; it belongs into bit 2. What comes from next bytes falls to the mask.
      const __m256i bytes = _mm256_set1_epi64x(plane);
      const __m256i high = v ? _mm256_srlv_epi64(bytes, _mm256_setr_epi64x(2, 3, 4, 5))
                             : _mm256_srlv_epi64(_mm256_slli_epi64(bytes, 2), _mm256_setr_epi64x(0, 1, 2, 3));
      return Or(low, And(wrap(high), Set(u8, 4)));
    }
  }

  template <int bits>
  static Bytes UnpackField(Bytes bytes, size_t n) {
    const Bytes moved = n ? wrap(_mm256_srli_epi16(raw(bytes), static_cast<int>(bits * n))) : bytes;
    return And(moved, Set(u8, (1 << bits) - 1));
  }

  // Without dot products: sums of pairs in 16 bits.
  struct Sum {
    __m256i value;
  };
  static constexpr bool kUnlimited = kAvx512;
  static constexpr size_t Capacity(int largest_u, int largest_s) {
    return kUnlimited ? ~size_t{0} : static_cast<size_t>(32767 / (2 * largest_u * largest_s));
  }
  static Sum ZeroSum() { return {_mm256_setzero_si256()}; }
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  static void Accumulate(Sum& sum, Bytes u, Bytes s) { sum.value = _mm256_dpbusd_epi32(sum.value, raw(u), raw(s)); }
  static Ints Total(Sum sum) { return reinterpret_cast<Ints>(sum.value); }
  static Ints SumOfMulQuadAccumulate(I32, Bytes u, Bytes s, Ints sum) {
    return reinterpret_cast<Ints>(_mm256_dpbusd_epi32(reinterpret_cast<__m256i>(sum), raw(u), raw(s)));
  }
#else
  static void Accumulate(Sum& sum, Bytes u, Bytes s) {
    sum.value = _mm256_add_epi16(sum.value, _mm256_maddubs_epi16(raw(u), raw(s)));
  }
  static Ints Total(Sum sum) { return reinterpret_cast<Ints>(_mm256_madd_epi16(sum.value, _mm256_set1_epi16(1))); }
  static Ints SumOfMulQuadAccumulate(I32, Bytes u, Bytes s, Ints sum) {
    Sum one = ZeroSum();
    Accumulate(one, u, s);
    return Add(sum, Total(one));
  }
#endif

  static Floats MulAdd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats PromoteTo(F32, Halves v) { return _mm256_cvtph_ps(reinterpret_cast<__m128i>(v)); }
  static Floats LoadConvert(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static float ReduceSum(F32, Floats v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  static void Interleave4(const Bytes (&in)[4], Bytes (&out)[4]) {
    const __m256i ab = _mm256_unpacklo_epi8(raw(in[0]), raw(in[1])), ab2 = _mm256_unpackhi_epi8(raw(in[0]), raw(in[1]));
    const __m256i cd = _mm256_unpacklo_epi8(raw(in[2]), raw(in[3])), cd2 = _mm256_unpackhi_epi8(raw(in[2]), raw(in[3]));
    out[0] = wrap(_mm256_unpacklo_epi16(ab, cd));
    out[1] = wrap(_mm256_unpackhi_epi16(ab, cd));
    out[2] = wrap(_mm256_unpacklo_epi16(ab2, cd2));
    out[3] = wrap(_mm256_unpackhi_epi16(ab2, cd2));
  }

  static void OrderLanes(Floats (&v)[4]) {
    const Floats low = _mm256_permute2f128_ps(v[0], v[1], 0x20), high = _mm256_permute2f128_ps(v[0], v[1], 0x31);
    v[1] = _mm256_permute2f128_ps(v[2], v[3], 0x20);
    v[3] = _mm256_permute2f128_ps(v[2], v[3], 0x31);
    v[0] = low;
    v[2] = high;
  }

  static void Transpose(const uint8_t* rows, size_t stride, uint8_t* out, size_t out_stride) {
    __m256i a[8], b[8];
    for (size_t i = 0; i < 8; ++i) a[i] = raw(LoadU(u8, rows + i * stride));
    for (size_t i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (size_t i = 0; i < 8; i += 4) {
      a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (size_t c = 0; c < 4; ++c) {
      StoreU(wrap(_mm256_permute2x128_si256(a[c], a[4 + c], 0x20)), out + c * out_stride);
      StoreU(wrap(_mm256_permute2x128_si256(a[c], a[4 + c], 0x31)), out + (4 + c) * out_stride);
    }
  }

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  // For integer/chunk_halves.h and integer/dense_one_row.h: a value for each half, words of 64 bits, 16 bytes from each
  // of p and p + stride, and the sums of four vectors' lanes.
  static Bytes SetHalves(U8, uint8_t lower, uint8_t upper) {
    return wrap(_mm256_set_m128i(_mm_set1_epi8(static_cast<char>(upper)), _mm_set1_epi8(static_cast<char>(lower))));
  }
  static Floats SetHalves(F32, float lower, float upper) {
    return _mm256_set_m128(_mm_set1_ps(upper), _mm_set1_ps(lower));
  }
  // Bits of a where the mask has a 1, of b elsewhere: Highway's IfVecThenElse.
  static Bytes IfVecThenElse(Bytes mask, Bytes a, Bytes b) {
    return wrap(_mm256_ternarylogic_epi64(raw(mask), raw(a), raw(b), 0xca));
  }
  static Bytes Set64(U8, uint64_t word) { return wrap(_mm256_set1_epi64x(static_cast<long long>(word))); }
  template <int a, int b, int c, int d>
  static Bytes ShiftRight64(Bytes v) {
    return wrap(_mm256_srlv_epi64(raw(v), _mm256_setr_epi64x(a, b, c, d)));
  }
  template <int a, int b, int c, int d>
  static Bytes RotateLeft64(Bytes v) {
    return wrap(_mm256_rolv_epi64(raw(v), _mm256_setr_epi64x(a, b, c, d)));
  }
  template <int count>
  static Bytes ShiftRight16(Bytes v) {
    return wrap(_mm256_srli_epi16(raw(v), count));
  }
  static Bytes LoadCombine128(U8, const int8_t* p, size_t stride) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + stride));
    return wrap(_mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1));
  }
  static VecBase<16>::Floats ReduceSum4(F32, const Floats (&v)[4]) {
    const Floats all = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  }
#endif

 private:
  static __m256i raw(Bytes v) { return reinterpret_cast<__m256i>(v); }
  static Bytes wrap(__m256i v) { return reinterpret_cast<Bytes>(v); }
};

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
