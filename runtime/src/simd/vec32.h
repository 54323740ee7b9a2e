// 32 bytes at a time: AVX2 with FMA and F16C, and the dot products of AVX-512 VNNI where the compiler has them.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace fips {
namespace FIPS_ISA {
namespace {

struct Vec32 {
  static constexpr size_t kBytes = 32, kLanes = 8;
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  static constexpr size_t kRegisters = 32;
  static constexpr bool kBothSigned = false, kEightBits = true;
#else
  static constexpr size_t kRegisters = 16;
  static constexpr bool kBothSigned = false, kEightBits = false;
#endif
  static constexpr bool kPlain = false;
  using Bytes = __m256i;
  using Ints = __m256i;
  using Floats = __m256;

  static Bytes load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store(void* p, Bytes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static Bytes fill(uint8_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }
  static Bytes repeat16(const void* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  }
  static Bytes repeat4(const void* p) { return _mm256_set1_epi32(*static_cast<const int32_t*>(p)); }
  template <size_t sources>
  static Bytes repeat4(const void* p, size_t stride) {
    if constexpr (sources == 1) return repeat4(p);
    return _mm256_blend_epi32(repeat4(p), repeat4(static_cast<const char*>(p) + stride), 0xf0);
  }
  static Bytes add(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
  static Bytes bit_or(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  static Bytes and_or(Bytes a, Bytes b, Bytes c) {
#if defined(__AVX512VL__)
    return _mm256_ternarylogic_epi64(a, b, c, 0xea);
#else
    return _mm256_or_si256(_mm256_and_si256(a, b), c);
#endif
  }
  static Bytes select(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }

  static Bytes pairs(const uint8_t* p, size_t part) {
    const long long first = 4 * static_cast<long long>(part);
    return _mm256_srlv_epi64(repeat16(p), _mm256_setr_epi64x(first, first, first + 2, first + 2));
  }

  template <int bits>
  static Bytes chunk(const uint8_t* p, size_t part) {
    if constexpr (bits == 8) {
      return load(p + 32 * part);
    } else if constexpr (bits == 4) {
      return _mm256_and_si256(part ? _mm256_srli_epi16(load(p), 4) : load(p), fill(15));
    } else {
      const Bytes low = _mm256_and_si256(pairs(p, part), fill(3));
      if constexpr (bits == 2) return low;
      long long plane;
      __builtin_memcpy(&plane, p + 16, 8);
      // Lane q holds bit 4 part + q of every byte; it belongs into bit 2. What comes from next bytes falls to the mask.
      const __m256i bytes = _mm256_set1_epi64x(plane);
      const Bytes high = part ? _mm256_srlv_epi64(bytes, _mm256_setr_epi64x(2, 3, 4, 5))
                              : _mm256_srlv_epi64(_mm256_slli_epi64(bytes, 2), _mm256_setr_epi64x(0, 1, 2, 3));
      return _mm256_or_si256(low, _mm256_and_si256(high, fill(4)));
    }
  }

  template <int bits>
  static Bytes field(Bytes bytes, size_t n) {
    return _mm256_and_si256(n ? _mm256_srli_epi16(bytes, static_cast<int>(bits * n)) : bytes, fill((1 << bits) - 1));
  }
  template <int bits>
  static Ints field_total(Ints total, size_t) {
    return total;
  }

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  struct Sum {
    __m256i value;
  };
  static constexpr bool kUnlimited = true;
  static constexpr size_t adds(int, int) { return ~size_t{0}; }
  static void add(Sum& sum, Bytes u, Bytes s) { sum.value = _mm256_dpbusd_epi32(sum.value, u, s); }
  static Ints total(Sum sum) { return sum.value; }
#else
  // Sums of pairs in 16 bits.
  struct Sum {
    __m256i value;
  };
  static constexpr bool kUnlimited = false;
  static constexpr size_t adds(int largest_u, int largest_s) {
    return static_cast<size_t>(32767 / (2 * largest_u * largest_s));
  }
  static void add(Sum& sum, Bytes u, Bytes s) { sum.value = _mm256_add_epi16(sum.value, _mm256_maddubs_epi16(u, s)); }
  static Ints total(Sum sum) { return _mm256_madd_epi16(sum.value, _mm256_set1_epi16(1)); }
#endif
  static Ints dot(Ints sum, Bytes u, Bytes s) {
    Sum one{_mm256_setzero_si256()};
    add(one, u, s);
    return _mm256_add_epi32(sum, total(one));
  }
  static Sum zero_sum() { return {_mm256_setzero_si256()}; }
  static Ints zero_ints() { return _mm256_setzero_si256(); }
  static Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
  static Ints shift7(Ints a) { return _mm256_slli_epi32(a, 7); }

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats set(float value) { return _mm256_set1_ps(value); }
  static Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static Floats as_floats(Bytes v) { return _mm256_castsi256_ps(v); }
  static Floats floats(Ints v) { return _mm256_cvtepi32_ps(v); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats halves(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static float sum(Floats v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  static void interleave4(const Bytes (&in)[4], Bytes (&out)[4]) {
    const Bytes ab = _mm256_unpacklo_epi8(in[0], in[1]), ab2 = _mm256_unpackhi_epi8(in[0], in[1]);
    const Bytes cd = _mm256_unpacklo_epi8(in[2], in[3]), cd2 = _mm256_unpackhi_epi8(in[2], in[3]);
    out[0] = _mm256_unpacklo_epi16(ab, cd);
    out[1] = _mm256_unpackhi_epi16(ab, cd);
    out[2] = _mm256_unpacklo_epi16(ab2, cd2);
    out[3] = _mm256_unpackhi_epi16(ab2, cd2);
  }

  static void turn_lanes(Floats (&v)[4]) {
    const Floats low = _mm256_permute2f128_ps(v[0], v[1], 0x20), high = _mm256_permute2f128_ps(v[0], v[1], 0x31);
    v[1] = _mm256_permute2f128_ps(v[2], v[3], 0x20);
    v[3] = _mm256_permute2f128_ps(v[2], v[3], 0x31);
    v[0] = low;
    v[2] = high;
  }

  static void transpose(const uint8_t* rows, size_t stride, uint8_t* out, size_t out_stride) {
    Bytes a[8], b[8];
    for (size_t i = 0; i < 8; ++i) a[i] = load(rows + i * stride);
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
      store(out + c * out_stride, _mm256_permute2x128_si256(a[c], a[4 + c], 0x20));
      store(out + (4 + c) * out_stride, _mm256_permute2x128_si256(a[c], a[4 + c], 0x31));
    }
  }
};

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
