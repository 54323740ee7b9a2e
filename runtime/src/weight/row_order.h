// Says where rows are stored that have several bit-widths and an order of their own (fips_ort/row_order.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "weight/weight.h"

namespace fips {

// How many rows of each segment come before every kStep-th row: with them, and the bits of up to kStep rows, a row is
// found. Numbers for every row would be a megabyte for 262,144 rows, in each node, that every product reads.
class RowOrder {
 public:
  static constexpr size_t kStep = 64;

  // row_bits [rows]. Throws InvalidWeight if the layout has no order of rows, or another number of rows of some width.
  RowOrder(const Layout& layout, const uint8_t* row_bits, size_t size);

  // Number of rows of a segment among the first `row` rows, a multiple of kStep or all.
  size_t before(size_t row, size_t segment) const { return before_[(row + kStep - 1) / kStep * segments_ + segment]; }
  // Where a row is stored, in the whole weight.
  size_t stored_row(const Layout& layout, const uint8_t* row_bits, size_t row) const;

 private:
  size_t segments_;
  std::vector<uint32_t> before_;  // [steps + 1][segments]
};

}  // namespace fips
