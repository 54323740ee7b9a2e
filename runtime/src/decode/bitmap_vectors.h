// Decodes bitmaps 64 codes and 64 entries at a time, on CPUs with instructions that spread bits and bytes over a
// vector. V is Vec, if it has kExpands.
#pragma once

#include "simd/vec.h"
#include "weight/weight.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// Spreads 64 codes of a stream: each 64-bit lane gets the bytes of its 8 codes, then each byte its own shift.
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

// Bytes of codes are read up to `codes_end`; what lies behind it counts as zero.
template <typename V, int bits>
void bytes_of_codes_by_64(const uint8_t* codes, const uint8_t* codes_end, uint64_t bit, size_t count, const Encoding& e,
                          uint8_t* out) {
  using Bytes = typename V::Bytes;
  static constexpr Spread64<bits> kSpread{};
  const Bytes ones = V::Set64(u8, e.ones), code_bits = V::Set(u8, static_cast<uint8_t>(low_bits(bits) << e.shift));
  const Bytes source = V::LoadU(u8, kSpread.source);
  const int offset = static_cast<int>(bit % 8) - e.shift;  // of 64 codes alike, which take whole bytes
  const Bytes shift = V::Add(V::LoadU(u8, kSpread.shift), V::Set(u8, static_cast<uint8_t>(offset)));
  const uint8_t* in = codes + bit / 8;
  for (size_t i = 0; i < count; i += 64, in += 8 * bits) {
    prefetch(in);
    const Bytes stored = V::LoadN(u8, in, in < codes_end ? static_cast<size_t>(codes_end - in) : 0);
    const Bytes spread = V::MultiShift(V::TableLookupLanes(stored, source), shift);
    V::StoreU(V::AndOr(spread, code_bits, ones), out + i);
  }
}

// 64 entries: where the pattern has a bit the next one of `bytes`, which moves on, else a byte of `others`. Reads 64
// bytes.
template <typename V>
inline typename V::Bytes expand_chunk(const uint8_t*& bytes, const uint8_t* pattern, typename V::Bytes others) {
  uint64_t word;
  std::memcpy(&word, pattern, 8);
  const typename V::Bytes entries = V::ExpandOr(V::LoadU(u8, bytes), word, others);
  bytes += static_cast<size_t>(__builtin_popcountll(word));
  return entries;
}

template <typename V>
inline void expand_by_64(const uint8_t* bytes, const uint8_t* pattern, size_t entries, uint64_t absent, uint8_t* out) {
  const typename V::Bytes others = V::Set64(u8, absent);
  const size_t whole = entries / 64 * 64;
  for (size_t i = 0; i < whole; i += 64, pattern += 8) {
    V::StoreU(expand_chunk<V>(bytes, pattern, others), out + i);
  }
  if (whole < entries) {
    const uint64_t word = read_word(pattern, pattern + (entries - whole) / 8);
    V::StoreN(V::ExpandOr(V::LoadU(u8, bytes), word, others), out + whole, entries - whole);
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
