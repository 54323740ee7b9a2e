// Works on 16 bytes at a time in plain C++, for every CPU. It says what the members of all vectors mean: those of other
// instruction sets have the same names.
#pragma once

#include "simd/vec16.h"

namespace fips {
namespace FIPS_ISA {
namespace {

struct PlainVec : Vec16 {
  using Half = PlainVec;                            // a vector of half the size, where there is one
  static constexpr bool kPlain = true;              // plain C++: code for every block size is large, and no faster
  static constexpr size_t kRegisters = 16;          // how many vectors the CPU holds
  static constexpr bool kBothSigned = false;        // whether sums read their unsigned bytes as signed ones
  static constexpr bool kEightBits = true;          // whether they take unsigned bytes up to 255
  static constexpr bool kExpands = false;           // whether there are ExpandOr and MultiShift (vec64.h)
  static constexpr bool kExpands8 = false;          // whether there is ExpandOr8 (vec32.h): each of 8 bytes is the byte
                                                    // of `bytes` at its place, or of `absent` if that is 0x80

  // Each byte of a table of 16 (in wider vectors: of the same 16 bytes of the table) by its index, below 16.
  static Bytes TableLookupBytes(Bytes table, Bytes index) {
    uint8_t bytes[kBytes];
    StoreU(table, bytes);
    Bytes result;
    for (size_t i = 0; i < kBytes; ++i) result[i] = bytes[index[i] & 15];
    return result;
  }

  // The lowest two bits of each byte are integer v · kBytes and up of a chunk of 2 bits, the others anything.
  static Bytes UnpackPairs(const uint8_t* p, size_t v) { return LoadU(u8, p) >> static_cast<uint8_t>(2 * v); }

  // Integers v · kBytes and up of a chunk of 64 of `bits` bits (fips_ort/bits.py), one per byte.
  template <int bits>
  static Bytes UnpackChunk(const uint8_t* p, size_t v) {
    if constexpr (bits == 8) {
      return LoadU(u8, p + 16 * v);
    } else if constexpr (bits == 4) {
      return (LoadU(u8, p + 16 * (v % 2)) >> static_cast<uint8_t>(v / 2 * 4)) & 15;
    } else {
      const Bytes low = UnpackPairs(p, v) & 3;
      if constexpr (bits == 2) return low;
      uint64_t plane;
      std::memcpy(&plane, p + 16, 8);
      const uint64_t halves[2] = {plane >> (2 * v), plane >> (2 * v + 1)};
      return low | (LoadU(u8, halves) & 1) << 2;
    }
  }

  // Field number n, of `bits` bits, of every byte.
  template <int bits>
  static Bytes UnpackField(Bytes bytes, size_t n) {
    return bytes >> static_cast<uint8_t>(bits * n) & static_cast<uint8_t>((1 << bits) - 1);
  }

  // Sums of products of unsigned and signed bytes: four in each lane.
  struct Sum {
    Ints value;
  };
  // How many products of at most these magnitudes a sum holds before its total must be taken; or no matter how many.
  static constexpr bool kUnlimited = true;
  static constexpr size_t Capacity(int, int) { return ~size_t{0}; }
  static Sum ZeroSum() { return {Ints{}}; }
  static void Accumulate(Sum& sum, Bytes u, Bytes s) {
    typedef int16_t Words __attribute__((vector_size(16)));
    typedef uint16_t UnsignedWords __attribute__((vector_size(16)));
    const Words even = reinterpret_cast<Words>(reinterpret_cast<UnsignedWords>(u) & 255) *
                       ((reinterpret_cast<Words>(s) << 8) >> 8);
    const Words odd =
        reinterpret_cast<Words>(reinterpret_cast<UnsignedWords>(u) >> 8) * (reinterpret_cast<Words>(s) >> 8);
    const Ints a = reinterpret_cast<Ints>(even), b = reinterpret_cast<Ints>(odd);
    sum.value += ((a << 16) >> 16) + (a >> 16) + ((b << 16) >> 16) + (b >> 16);
  }
  static Ints Total(Sum sum) { return sum.value; }
  // `sum` with such a product added, and no limit.
  static Ints SumOfMulQuadAccumulate(I32, Bytes u, Bytes s, Ints sum) {
    Sum all{sum};
    Accumulate(all, u, s);
    return all.value;
  }

  // a · b + c
  static Floats MulAdd(Floats a, Floats b, Floats c) { return a * b + c; }
  static Floats PromoteTo(F32, Halves v) {
    Floats result;
    for (size_t i = 0; i < kLanes; ++i) result[i] = float_from_half(v[i]);
    return result;
  }
  static float ReduceSum(F32, Floats v) { return (v[0] + v[2]) + (v[1] + v[3]); }

  // Four rows of columns → four bytes of every column together: within each 16 columns, out[q] has columns 4 q … 4 q +
  // 3.
  static void Interleave4(const Bytes (&in)[4], Bytes (&out)[4]) {
    uint8_t rows[4][kBytes], columns[4 * kBytes];
    for (size_t i = 0; i < 4; ++i) StoreU(in[i], rows[i]);
    for (size_t i = 0; i < 4 * kBytes; ++i) columns[i] = rows[i % 4][i / 4];
    for (size_t q = 0; q < 4; ++q) out[q] = LoadU(u8, columns + q * kBytes);
  }
};

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
