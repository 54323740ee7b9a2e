// Counts rows by their bits.
#include "weight/row_order.h"

#include <algorithm>
#include <array>
#include <string>

namespace fips {

RowOrder::RowOrder(const Layout& layout, const uint8_t* row_bits, size_t size) : segments_(layout.segments.size()) {
  if (!layout.trans_b || layout.columns_cut || layout.sparse()) {
    throw InvalidWeight("row_bits needs transB 1 and segment_axis 0");
  }
  if (size != layout.rows) {
    throw InvalidWeight("row_bits has " + std::to_string(size) + " elements, expected " + std::to_string(layout.rows));
  }
  std::array<size_t, 256> segment_of;
  segment_of.fill(segments_);
  for (size_t s = 0; s < segments_; ++s) segment_of[static_cast<size_t>(layout.segments[s].bits)] = s;
  before_.reserve(((size + kStep - 1) / kStep + 1) * segments_);
  std::array<uint32_t, 4> counts{};
  for (size_t row = 0; row < size; ++row) {
    if (row % kStep == 0) before_.insert(before_.end(), counts.begin(), counts.begin() + segments_);
    const size_t segment = segment_of[row_bits[row]];
    if (segment == segments_) {
      throw InvalidWeight("row_bits has " + std::to_string(row_bits[row]) + " at " + std::to_string(row) +
                          ", but no segment has so many bits");
    }
    ++counts[segment];
  }
  before_.insert(before_.end(), counts.begin(), counts.begin() + segments_);
  for (size_t s = 0; s < segments_; ++s) {
    if (counts[s] == layout.segments[s].rows()) continue;
    throw InvalidWeight("row_bits has " + std::to_string(counts[s]) + " rows of " +
                        std::to_string(layout.segments[s].bits) + " bits, the segment " +
                        std::to_string(layout.segments[s].rows()));
  }
}

size_t RowOrder::stored_row(const Layout& layout, const uint8_t* row_bits, size_t row) const {
  const uint8_t bits = row_bits[row];
  size_t segment = 0;
  while (layout.segments[segment].bits != bits) ++segment;
  const size_t step = row / kStep * kStep;
  const auto earlier = std::count(row_bits + step, row_bits + row, bits);
  return layout.segments[segment].row_begin + before(step, segment) + static_cast<size_t>(earlier);
}

}  // namespace fips
