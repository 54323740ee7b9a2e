// Decodes bitmaps 8 codes at a time, and entries 8 at a time or one by one.
#pragma once

#include "simd/vec.h"
#include "weight/weight.h"

namespace fips {
namespace FIPS_ISA {
namespace {

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

template <int bits>
void bytes_of_codes_by_8(const uint8_t* codes, const uint8_t* codes_end, uint64_t bit, size_t count, const Encoding& e,
                         uint8_t* out) {
  const uint8_t* in = codes + bit / 8;
  for (size_t i = 0; i < count; i += 8, in += bits) {
    const uint64_t values = spread8<bits>(read_word(in, codes_end) >> (bit % 8)) << e.shift | e.ones;
    std::memcpy(out + i, &values, 8);
  }
}

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

// V: Vec, if it has kExpands8.
template <typename V>
inline void expand_by_8(const uint8_t* bytes, const uint8_t* pattern, size_t entries, uint64_t absent, uint8_t* out) {
  static constexpr Places kPlaces{};
  for (size_t i = 0; i < entries; i += 8, ++pattern) {
    V::ExpandOr8(bytes, kPlaces.of[*pattern], absent, out + i);
    bytes += __builtin_popcount(*pattern);
  }
}

inline void expand_by_1(const uint8_t* bytes, const uint8_t* pattern, size_t entries, uint64_t absent, uint8_t* out) {
  for (size_t i = 0; i < entries; i += 8) {
    std::memcpy(out + i, &absent, 8);
    for (unsigned rest = *pattern++; rest; rest &= rest - 1) {
      out[i + static_cast<size_t>(__builtin_ctz(rest))] = *bytes++;
    }
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
