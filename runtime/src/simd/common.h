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
  // No step has a subnormal float, which the CPU may be told to take for zero. Only the value of subnormal halves is
  // wanted, all of which are normal floats.
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  float value = static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (rest >= 0x400) bits = (rest << 13) + (rest < 0x7c00 ? 0x38000000 : 0x70000000);  // moves the exponent's bias
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
