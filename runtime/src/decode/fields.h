// Says where the codes of 2 and 4 bits are in a vector of the stored bytes of a dense row. They fill their bytes, so
// that several columns can be multiplied at the price of one, without moving their bytes.
#pragma once

#include "simd/vec.h"
#include "weight/weight.h"

namespace fips {
namespace FIPS_ISA {
namespace {

template <typename V, int bits>
struct Fields {
  static constexpr bool kFill = bits == 2 || bits == 4;
  static constexpr size_t kCount = 8 / bits;              // of a byte
  static constexpr size_t kColumns = V::kBytes * kCount;  // of a vector
  static constexpr size_t kChunkBytes = 8 * bits;

  // Column of field `field` of byte `byte` of a row.
  static constexpr size_t column(size_t byte, size_t field) {
    return byte / kChunkBytes * kChunk + byte % kChunkBytes + field * kChunkBytes;
  }
};

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
