// A weight among the inputs of a node. What is made of initializers is checked once, when the session is made, and only
// what follows from it is kept: the bytes stay where ONNX Runtime has them, once for all nodes that read them.
#pragma once

#include <optional>

#include "ort/node.h"
#include "weight/row_order.h"
#include "weight/weight.h"

namespace fips::ort {

// Which inputs of a node they are; pattern is 0 if it has none, row_bits if it takes none.
struct WeightInputs {
  size_t codes, pattern, scales, row_bits;
};

// What was found out when the session was made, or else is at a run.
struct WeightIndex {
  std::optional<StreamIndex> streams;
  std::optional<RowOrder> order;
};

class StoredWeight {
 public:
  // Throws InvalidWeight.
  StoredWeight(const Api& api, const OrtKernelInfo* info, const Attributes& attributes, const WeightInputs& inputs);

  // The weight at a run. fresh: what it refers to, as long as it lives, of inputs that are no initializers. Throws
  // InvalidWeight.
  Weight read(const Api& api, const OrtKernelContext* context, WeightIndex& fresh) const;

  const Layout& layout() const { return layout_; }

 private:
  void check_scales(const Tensor& scales) const;
  StreamIndex index_of(const Tensor& codes, const Tensor* pattern) const;
  RowOrder order_of(const Tensor& row_bits) const;

  WeightInputs inputs_;
  Layout layout_;
  WeightIndex index_;
};

}  // namespace fips::ort
