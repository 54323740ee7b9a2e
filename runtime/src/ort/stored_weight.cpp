#include "ort/stored_weight.h"

namespace fips::ort {

StoredWeight::StoredWeight(const Api& api, const OrtKernelInfo* info, const Attributes& attributes,
                           const WeightInputs& inputs)
    : inputs_(inputs), layout_(attributes) {
  const auto constant = [&](size_t index) {
    return index ? constant_input(api, info, index) : std::optional<Tensor>();
  };
  const std::optional<Tensor> codes = constant(inputs_.codes), pattern = constant(inputs_.pattern);
  const std::optional<Tensor> scales = constant(inputs_.scales), row_bits = constant(inputs_.row_bits);
  if (scales) check_scales(*scales);
  if (codes && (pattern || !inputs_.pattern)) index_.streams.emplace(index_of(*codes, pattern ? &*pattern : nullptr));
  if (row_bits) index_.order.emplace(order_of(*row_bits));
}

Weight StoredWeight::read(const Api& api, const OrtKernelContext* context, WeightIndex& fresh) const {
  const Tensor codes = *input(api, context, inputs_.codes), scales = *input(api, context, inputs_.scales);
  std::optional<Tensor> pattern, row_bits;
  if (inputs_.pattern) pattern = input(api, context, inputs_.pattern);
  if (inputs_.row_bits) row_bits = input(api, context, inputs_.row_bits);
  check_scales(scales);
  if (!index_.streams) fresh.streams.emplace(index_of(codes, pattern ? &*pattern : nullptr));
  if (row_bits && !index_.order) fresh.order.emplace(order_of(*row_bits));
  Weight weight{};
  weight.layout = &layout_;
  weight.index = index_.streams ? &*index_.streams : &*fresh.streams;
  weight.codes = codes.as<uint8_t>();
  weight.codes_size = codes.size();
  weight.scales = scales.as<uint16_t>();
  if (pattern) weight.pattern = pattern->as<uint8_t>();
  if (row_bits) {
    weight.row_bits = row_bits->as<uint8_t>();
    weight.row_order = index_.order ? &*index_.order : &*fresh.order;
  }
  return weight;
}

void StoredWeight::check_scales(const Tensor& scales) const {
  const int64_t blocks = static_cast<int64_t>(layout_.blocks);
  if (layout_.n_of_m()) {
    require_shape("scales", scales, {static_cast<int64_t>(layout_.tiles()), blocks, static_cast<int64_t>(kTileRows)});
  } else {
    require_shape("scales", scales, {static_cast<int64_t>(layout_.rows), blocks});
  }
}

StreamIndex StoredWeight::index_of(const Tensor& codes, const Tensor* pattern) const {
  return StreamIndex(layout_, pattern ? pattern->as<uint8_t>() : nullptr,
                     pattern ? vector_size("pattern", *pattern) : 0, vector_size("codes", codes));
}

RowOrder StoredWeight::order_of(const Tensor& row_bits) const {
  return RowOrder(layout_, row_bits.as<uint8_t>(), vector_size("row_bits", row_bits));
}

}  // namespace fips::ort
