// Brings outputs from the order of storage, a segment of rows after the other, to that of row_bits.
#pragma once

#include "simd/vec.h"
#include "weight/weight.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// y [count]: for each of row_bits [count] the next of the values of its segment. begins: where the values of each of the
// layout's segments begin; count + the last of them below 2 ** 16.
template <typename V>
void merge_rows_of(const Layout& layout, const uint8_t* row_bits, size_t count, const float* values,
                   const size_t (&begins)[4], float* y) {
  size_t j = 0;
  // By bits: 16 times the segment, whose next place is that field of `places`. A table of places would make every row
  // wait until the last one's is in memory.
  uint8_t shifts[9] = {};
  uint64_t places = 0;
  if constexpr (V::kExpands) {
    const float* next[4];
    for (size_t s = 0; s < layout.segments.size(); ++s) next[s] = values + begins[s];
    for (; j + V::kLanes <= count; j += V::kLanes) {
      typename V::Floats rows = V::Zero(f32);
      for (size_t s = 0; s < layout.segments.size(); ++s) {
        const uint32_t here = V::EqualLanes(row_bits + j, static_cast<uint8_t>(layout.segments[s].bits));
        rows = V::LoadExpandOr(next[s], here, rows);
        next[s] += __builtin_popcount(here);
      }
      V::StoreU(rows, y + j);
    }
    for (size_t s = 0; s < layout.segments.size(); ++s) places |= static_cast<uint64_t>(next[s] - values) << (16 * s);
  } else {
    for (size_t s = 0; s < layout.segments.size(); ++s) places |= static_cast<uint64_t>(begins[s]) << (16 * s);
  }
  for (size_t s = 0; s < layout.segments.size(); ++s) shifts[layout.segments[s].bits] = static_cast<uint8_t>(16 * s);
  for (; j < count; ++j) {
    const uint8_t shift = shifts[row_bits[j]];
    y[j] = values[places >> shift & 0xffff];
    places += uint64_t{1} << shift;
  }
}

void merge_rows(const Layout& layout, const uint8_t* row_bits, size_t count, const float* values,
                const size_t (&begins)[4], float* y) {
  merge_rows_of<Vec>(layout, row_bits, count, values, begins, y);
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
