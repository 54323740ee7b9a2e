// Bitmap weights → one byte per entry: a stream of codes becomes bytes, and those go where the pattern has its bits.
#pragma once

#include "simd/common.h"
#include "weight/weight.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(FIPS_PLAIN)
#include <arm_neon.h>
#endif

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr uint64_t kEveryByte = 0x0101010101010101u;
constexpr size_t kBitmapEntries = 8192;  // decoded at a time

constexpr uint64_t low_bits(size_t bits) { return bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }

// Up to 8 bytes; those from `end` on read as zero.
inline uint64_t read_word(const uint8_t* p, const uint8_t* end) {
  uint64_t word = 0;
  if (end - p >= 8) {
    std::memcpy(&word, p, 8);
  } else {
    std::memcpy(&word, p, p < end ? static_cast<size_t>(end - p) : 0);
  }
  return word;
}

inline uint64_t count_bits(const uint8_t* bytes, size_t size) {
  uint64_t count = 0, word;
  size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    std::memcpy(&word, bytes + i, 8);
    count += static_cast<uint64_t>(__builtin_popcountll(word));
  }
  return count + static_cast<uint64_t>(__builtin_popcountll(read_word(bytes + i, bytes + size)));
}

#if defined(__AVX512VBMI2__)

// Bytes of codes are read up to `end`; what lies behind it counts as zero.
inline __m512i load_codes(const uint8_t* p, const uint8_t* end) {
  const size_t left = p < end ? static_cast<size_t>(end - p) : 0;
  return left >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(low_bits(left), p);
}

// Spreads 64 codes of a stream at a time: each 64-bit lane gets the bytes of its 8 codes, then each byte its own shift.
template <int bits>
struct Spread64 {
  constexpr Spread64() : source(), shift() {
    for (size_t j = 0; j < 64; ++j) {
      source[j] = static_cast<uint8_t>((j / 8 * bits + j % 8) & 63);
      shift[j] = static_cast<uint8_t>(j % 8 * bits);
    }
  }
  alignas(64) uint8_t source[64];
  alignas(64) uint8_t shift[64];
};

// `count` codes from bit `bit` of the stream → bytes (Encoding). Writes whole vectors, 63 bytes more at most.
template <int bits>
void bytes_of_codes(const uint8_t* codes, const uint8_t* codes_end, uint64_t bit, size_t count, const Encoding& e,
                    uint8_t* out) {
  static constexpr Spread64<bits> kSpread{};
  const __m512i ones = _mm512_set1_epi64(static_cast<long long>(e.ones));
  const __m512i code_bits = _mm512_set1_epi8(static_cast<char>(low_bits(bits) << e.shift));
  const __m512i source = _mm512_load_si512(kSpread.source);
  const int offset = static_cast<int>(bit % 8) - e.shift;  // of 64 codes alike, which take whole bytes
  const __m512i shift = _mm512_add_epi8(_mm512_load_si512(kSpread.shift), _mm512_set1_epi8(static_cast<char>(offset)));
  const uint8_t* in = codes + bit / 8;
  for (size_t i = 0; i < count; i += 64, in += 8 * bits) {
    prefetch(in);
    const __m512i spread =
        _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(source, load_codes(in, codes_end)));
    _mm512_storeu_si512(out + i, _mm512_ternarylogic_epi64(spread, code_bits, ones, 0xea));  // and, or
  }
}

// 64 entries: where the pattern has a bit the next one of `bytes`, which moves on, else a byte of `others`. Reads 64 bytes.
inline __m512i expand_chunk(const uint8_t*& bytes, const uint8_t* pattern, __m512i others) {
  uint64_t word;
  std::memcpy(&word, pattern, 8);
  const __m512i entries = _mm512_mask_expand_epi8(others, word, _mm512_loadu_si512(bytes));
  bytes += static_cast<size_t>(__builtin_popcountll(word));
  return entries;
}

// `entries` bytes: where the pattern has a bit the next one of `bytes`, else `absent`. May read 63 bytes more than that.
inline void expand_bytes(const uint8_t* bytes, const uint8_t* pattern, size_t entries, uint64_t absent, uint8_t* out) {
  const __m512i others = _mm512_set1_epi64(static_cast<long long>(absent));
  const size_t whole = entries / 64 * 64;
  for (size_t i = 0; i < whole; i += 64, pattern += 8) {
    _mm512_storeu_si512(out + i, expand_chunk(bytes, pattern, others));
  }
  if (whole < entries) {
    const uint64_t word = read_word(pattern, pattern + (entries - whole) / 8);
    const __m512i values = _mm512_mask_expand_epi8(others, word, _mm512_loadu_si512(bytes));
    _mm512_mask_storeu_epi8(out + whole, low_bits(entries - whole), values);
  }
}

#else

// 8 codes in the lowest bits of a word → 8 bytes.
template <int bits>
inline uint64_t spread8(uint64_t word) {
#if defined(__BMI2__)
  return _pdep_u64(word, low_bits(bits) * kEveryByte);
#else
  if (bits == 8) return word;
  word &= low_bits(8 * bits);
  word = (word | word << (32 - 4 * bits)) & (low_bits(4 * bits) * 0x0000000100000001u);
  word = (word | word << (16 - 2 * bits)) & (low_bits(2 * bits) * 0x0001000100010001u);
  return (word | word << (8 - bits)) & (low_bits(bits) * kEveryByte);
#endif
}

// `count` codes from bit `bit` of the stream → bytes (Encoding). Writes eight at a time, 7 bytes more at most.
template <int bits>
void bytes_of_codes(const uint8_t* codes, const uint8_t* codes_end, uint64_t bit, size_t count, const Encoding& e,
                    uint8_t* out) {
  const uint8_t* in = codes + bit / 8;
  for (size_t i = 0; i < count; i += 8, in += bits) {
    const uint64_t values = spread8<bits>(read_word(in, codes_end) >> (bit % 8)) << e.shift | e.ones;
    std::memcpy(out + i, &values, 8);
  }
}

#if defined(__AVX2__) || (defined(__ARM_NEON) && defined(__aarch64__) && !defined(FIPS_PLAIN))

// For every byte of a pattern which of the next bytes each of its 8 entries takes; 0x80: none.
struct Places {
  constexpr Places() : of() {
    for (size_t byte = 0; byte < 256; ++byte) {
      uint8_t next = 0;
      for (size_t i = 0; i < 8; ++i) of[byte][i] = byte >> i & 1 ? next++ : 0x80;
    }
  }
  alignas(64) uint8_t of[256][8];
};

// `entries` bytes: where the pattern has a bit the next one of `bytes`, else `absent`. Reads 8 bytes at a time, more than that.
inline void expand_bytes(const uint8_t* bytes, const uint8_t* pattern, size_t entries, uint64_t absent, uint8_t* out) {
  static constexpr Places kPlaces{};
  for (size_t i = 0; i < entries; i += 8, ++pattern) {
    const uint8_t* places = kPlaces.of[*pattern];
#if defined(__AVX2__)
    const __m128i index = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places));
    const __m128i taken = _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)), index);
    const __m128i others = _mm_set1_epi64x(static_cast<long long>(absent));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + i), _mm_blendv_epi8(taken, others, index));
#else
    const uint8x16_t next = vcombine_u8(vld1_u8(bytes), vdup_n_u8(0));
    vst1_u8(out + i, vqtbx1_u8(vcreate_u8(absent), next, vld1_u8(places)));
#endif
    bytes += __builtin_popcount(*pattern);
  }
}

#else

// `entries` bytes: where the pattern has a bit the next one of `bytes`, else `absent`.
inline void expand_bytes(const uint8_t* bytes, const uint8_t* pattern, size_t entries, uint64_t absent, uint8_t* out) {
  for (size_t i = 0; i < entries; i += 8) {
    std::memcpy(out + i, &absent, 8);
    for (unsigned rest = *pattern++; rest; rest &= rest - 1) out[i + static_cast<size_t>(__builtin_ctz(rest))] = *bytes++;
  }
}

#endif
#endif

// `count` entries, whole bytes of the pattern; the first code of them is number `first_code` of the stream. `kept` (0 or
// 1) unless null.
template <int bits>
void decode_bitmap(const uint8_t* codes, const uint8_t* codes_end, uint64_t first_code, const uint8_t* pattern,
                   size_t count, const Encoding& e, uint8_t* out, uint8_t* kept) {
  alignas(64) uint8_t bytes[kBitmapEntries + 64];
  for (size_t i = 0; i < count; i += kBitmapEntries, pattern += kBitmapEntries / 8) {
    const size_t entries = smaller(kBitmapEntries, count - i);
    prefetch_lines(pattern, entries / 8);
    const size_t present = count_bits(pattern, entries / 8);
    bytes_of_codes<bits>(codes, codes_end, first_code * bits, present, e, bytes);
    expand_bytes(bytes, pattern, entries, e.absent, out + i);
    for (size_t k = 0; kept && k < entries; ++k) kept[i + k] = pattern[k / 8] >> (k % 8) & 1;
    first_code += present;
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
