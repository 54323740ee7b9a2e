// Holds arithmetic of sizes and of bits, for the kernels and for what is compiled only once: the unnamed namespace
// gives every file a copy of its own, made for its instruction set (kernels.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fips {
namespace {

constexpr uint64_t kEveryByte = 0x0101010101010101u;

constexpr size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
constexpr size_t larger(size_t a, size_t b) { return a < b ? b : a; }
constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

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

// A number as a type, so that a visitor is compiled for it: visit(Constant<4>{}) and decltype(x)::kValue.
template <auto value>
struct Constant {
  static constexpr auto kValue = value;
};

}  // namespace
}  // namespace fips
