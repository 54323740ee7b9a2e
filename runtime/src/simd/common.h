// Holds prefetching and float16. Like every header of the kernels it is compiled once per instruction set, in a
// namespace of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "simd/integers.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "packed bytes are read as little-endian words");

namespace fips {
namespace FIPS_ISA {
namespace {

// Asks for memory that is read soon; it may lie past the end of the stream.
inline void prefetch(const uint8_t* p, uintptr_t ahead = 2048) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + ahead));
}

// The same for `size` bytes.
inline void prefetch_lines(const uint8_t* p, size_t size, uintptr_t ahead = 2048) {
  for (size_t line = 0; line < size; line += 64) prefetch(p + line, ahead);
}

// `size` bytes that are read later, when so much else has been read that the first cache has forgotten them.
inline void prefetch_to_second_cache(const uint8_t* p, size_t size) {
  for (size_t line = 0; line < size; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + line), 0, 2);
  }
}

inline float float_from_half(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  uint32_t bits = rest << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;  // moves the exponent's bias, and makes subnormal halves normal
  std::memcpy(&bits, &value, 4);
  if (rest >= 0x7c00) bits = 0x7f800000 | rest << 13;  // infinity, NaN
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
