// Decodes bitmap weights to one byte per entry: a stream of codes becomes bytes, and those go where the pattern has its
// bits.
#pragma once

#include "decode/bitmap_vectors.h"
#include "decode/bitmap_words.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kBitmapEntries = 8192;  // decoded at a time

// `count` codes from bit `bit` of the stream → bytes (Encoding). Writes up to 63 bytes more.
template <typename V, int bits>
inline void bytes_of_codes(const uint8_t* codes, const uint8_t* codes_end, uint64_t bit, size_t count,
                           const Encoding& e, uint8_t* out) {
  if constexpr (V::kExpands) {
    bytes_of_codes_by_64<V, bits>(codes, codes_end, bit, count, e, out);
  } else {
    bytes_of_codes_by_8<bits>(codes, codes_end, bit, count, e, out);
  }
}

// `entries` bytes: where the pattern has a bit the next one of `bytes`, else `absent`. May read 63 bytes more than
// that.
template <typename V>
inline void expand_bytes(const uint8_t* bytes, const uint8_t* pattern, size_t entries, uint64_t absent, uint8_t* out) {
  if constexpr (V::kExpands) {
    expand_by_64<V>(bytes, pattern, entries, absent, out);
  } else if constexpr (V::kExpands8) {
    expand_by_8<V>(bytes, pattern, entries, absent, out);
  } else {
    expand_by_1(bytes, pattern, entries, absent, out);
  }
}

// `count` entries, whole bytes of the pattern; the first code of them is number `first_code` of the stream. `kept` (0
// or 1) unless null.
template <int bits>
void decode_bitmap(const uint8_t* codes, const uint8_t* codes_end, uint64_t first_code, const uint8_t* pattern,
                   size_t count, const Encoding& e, uint8_t* out, uint8_t* kept) {
  alignas(64) uint8_t bytes[kBitmapEntries + 64];
  for (size_t i = 0; i < count; i += kBitmapEntries, pattern += kBitmapEntries / 8) {
    const size_t entries = smaller(kBitmapEntries, count - i);
    prefetch_lines(pattern, entries / 8);
    const size_t present = count_bits(pattern, entries / 8);
    bytes_of_codes<Vec, bits>(codes, codes_end, first_code * bits, present, e, bytes);
    expand_bytes<Vec>(bytes, pattern, entries, e.absent, out + i);
    for (size_t k = 0; kept && k < entries; ++k) kept[i + k] = pattern[k / 8] >> (k % 8) & 1;
    first_code += present;
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
