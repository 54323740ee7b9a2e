// Checks the numbers of rows and hands the rows to the threads.
#include "gather.h"

#include <stdexcept>
#include <string>

#include "weight/row_order.h"

namespace fips {

void q_gather(const Weight& weight, const int64_t* indices, size_t count, float* y, const Kernels& kernels,
              const ParallelFor& parallel_for) {
  const Layout& layout = *weight.layout;
  for (size_t i = 0; i < count; ++i) {
    if (indices[i] >= 0 && static_cast<uint64_t>(indices[i]) < layout.rows) continue;
    throw std::invalid_argument("indices has " + std::to_string(indices[i]) + ", which is not one of the " +
                                std::to_string(layout.rows) + " rows");
  }
  for_each(count, count * layout.columns, parallel_for, [&](size_t i) {
    size_t row = static_cast<size_t>(indices[i]);
    if (weight.row_order) row = weight.row_order->stored_row(layout, weight.row_bits, row);
    kernels.decode_row(weight, row, y + i * layout.columns);
  });
}

}  // namespace fips
