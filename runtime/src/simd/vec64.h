// 64 bytes at a time: AVX-512 with BW, VL, VNNI and VBMI. The members of every Vec… mean the same; vec16.h has them in
// plain C++.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace fips {
namespace FIPS_ISA {
namespace {

struct Vec64 {
  static constexpr size_t kBytes = 64, kLanes = 16;
  static constexpr size_t kRegisters = 32;
  static constexpr bool kBothSigned = false, kEightBits = true;
  static constexpr bool kPlain = false;
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;

  static Bytes load(const void* p) { return _mm512_loadu_si512(p); }
  static void store(void* p, Bytes v) { _mm512_storeu_si512(p, v); }
  static Bytes fill(uint8_t value) { return _mm512_set1_epi8(static_cast<char>(value)); }
  static Bytes repeat16(const void* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static Bytes repeat4(const void* p) { return _mm512_set1_epi32(*static_cast<const int32_t*>(p)); }
  template <size_t sources>
  static Bytes repeat4(const void* p, size_t stride) {
    const auto word = [&](size_t source) { return _mm_loadu_si32(static_cast<const char*>(p) + source * stride); };
    Bytes all = _mm512_broadcastd_epi32(word(0));
    if constexpr (sources == 2) all = _mm512_mask_broadcastd_epi32(all, 0xff00, word(1));
    if constexpr (sources == 4) {
      all = _mm512_mask_broadcastd_epi32(all, 0x00f0, word(1));
      all = _mm512_mask_broadcastd_epi32(all, 0x0f00, word(2));
      all = _mm512_mask_broadcastd_epi32(all, 0xf000, word(3));
    }
    return all;
  }
  static Bytes add(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
  static Bytes bit_or(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  // (a & b) | c
  static Bytes and_or(Bytes a, Bytes b, Bytes c) { return _mm512_ternarylogic_epi64(a, b, c, 0xea); }
  static Bytes select(Bytes table, Bytes index) { return _mm512_shuffle_epi8(table, index); }

  static Bytes pairs(const uint8_t* p, size_t) {
    return _mm512_srlv_epi64(repeat16(p), _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
  }

  template <int bits>
  static Bytes chunk(const uint8_t* p, size_t) {
    if constexpr (bits == 8) {
      return load(p);
    } else if constexpr (bits == 4) {
      const Bytes twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      return _mm512_and_si512(_mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4)), fill(15));
    } else {
      const Bytes low = pairs(p, 0);
      if constexpr (bits == 2) return _mm512_and_si512(low, fill(3));
      int64_t plane;
      __builtin_memcpy(&plane, p + 16, 8);
      // Lane q holds bit q of every byte; it belongs into bit 2.
      const Bytes high = _mm512_rolv_epi64(_mm512_set1_epi64(plane), _mm512_setr_epi64(2, 1, 0, 63, 62, 61, 60, 59));
      return and_or(high, fill(4), _mm512_and_si512(low, fill(3)));
    }
  }

  // Where they are: products of field n are 2 ** (bits * n) times as large.
  template <int bits>
  static Bytes field(Bytes bytes, size_t n) {
    return _mm512_and_si512(bytes, fill(static_cast<uint8_t>(((1 << bits) - 1) << (bits * n))));
  }
  template <int bits>
  static Ints field_total(Ints total, size_t n) {
    return _mm512_srai_epi32(total, static_cast<unsigned>(bits * n));
  }

  struct Sum {
    __m512i value;
  };
  static constexpr size_t adds(int, int) { return ~size_t{0}; }
  static Sum zero_sum() { return {_mm512_setzero_si512()}; }
  static constexpr bool kUnlimited = true;
  static void add(Sum& sum, Bytes u, Bytes s) { sum.value = _mm512_dpbusd_epi32(sum.value, u, s); }
  static Ints total(Sum sum) { return sum.value; }
  static Ints dot(Ints sum, Bytes u, Bytes s) { return _mm512_dpbusd_epi32(sum, u, s); }
  static Ints zero_ints() { return _mm512_setzero_si512(); }
  static Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static Ints shift7(Ints a) { return _mm512_slli_epi32(a, 7); }

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats set(float value) { return _mm512_set1_ps(value); }
  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static Floats as_floats(Bytes v) { return _mm512_castsi512_ps(v); }
  static Floats floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats halves(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static float sum(Floats v) { return _mm512_reduce_add_ps(v); }

  static void interleave4(const Bytes (&in)[4], Bytes (&out)[4]) {
    const Bytes ab = _mm512_unpacklo_epi8(in[0], in[1]), ab2 = _mm512_unpackhi_epi8(in[0], in[1]);
    const Bytes cd = _mm512_unpacklo_epi8(in[2], in[3]), cd2 = _mm512_unpackhi_epi8(in[2], in[3]);
    out[0] = _mm512_unpacklo_epi16(ab, cd);
    out[1] = _mm512_unpackhi_epi16(ab, cd);
    out[2] = _mm512_unpacklo_epi16(ab2, cd2);
    out[3] = _mm512_unpackhi_epi16(ab2, cd2);
  }

  static void turn_lanes(Floats (&v)[4]) {
    const Floats low = _mm512_shuffle_f32x4(v[0], v[1], 0x44), high = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
    const Floats low2 = _mm512_shuffle_f32x4(v[2], v[3], 0x44), high2 = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
    v[0] = _mm512_shuffle_f32x4(low, low2, 0x88);
    v[1] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    v[2] = _mm512_shuffle_f32x4(high, high2, 0x88);
    v[3] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }

  static void transpose(const uint8_t* rows, size_t stride, uint8_t* out, size_t out_stride) {
    Bytes a[16], b[16];
    for (size_t i = 0; i < 16; ++i) a[i] = load(rows + i * stride);
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
      const Bytes low = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88);
      const Bytes low2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
      const Bytes high = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
      const Bytes high2 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
      store(out + c * out_stride, _mm512_shuffle_i32x4(low, low2, 0x88));
      store(out + (8 + c) * out_stride, _mm512_shuffle_i32x4(low, low2, 0xdd));
      store(out + (4 + c) * out_stride, _mm512_shuffle_i32x4(high, high2, 0x88));
      store(out + (12 + c) * out_stride, _mm512_shuffle_i32x4(high, high2, 0xdd));
    }
  }
};

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
