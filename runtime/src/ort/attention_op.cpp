#include "ort/attention_op.h"

#include <algorithm>
#include <limits>

#include "attention.h"
#include "kernels.h"
#include "weight/weight.h"

namespace fips::ort {
namespace {

std::vector<Input> inputs_of(bool norms) {
  std::vector<Input> result = {{kFloat}, {kFloat}, {kFloat}, {kInt32}, {kInt32}, {kInt64}, {kFloat}, {kFloat}};
  if (norms) result.insert(result.end(), 2, {kFloat});
  return result;
}

size_t positive_attribute(const Api& api, const OrtKernelInfo* info, const char* name) {
  const int64_t value = int_attribute(api, info, name);
  if (value > 0 && value <= std::numeric_limits<int32_t>::max()) return static_cast<size_t>(value);
  throw InvalidWeight(std::string("attribute ") + name + " must be positive, got " + std::to_string(value));
}

// One node.
class AttentionKernel {
 public:
  AttentionKernel(const AttentionOp& op, const OrtKernelInfo* info)
      : op_(op), kernels_(select_kernels()), fixed_() {
    fixed_.heads = positive_attribute(op.api, info, "num_heads");
    fixed_.kv_heads = positive_attribute(op.api, info, "kv_num_heads");
    fixed_.scale = float_attribute(op.api, info, "scale");
    if (op.norms) fixed_.epsilon = float_attribute(op.api, info, "epsilon");
    const int64_t window = int_attribute(op.api, info, "local_window_size");
    if (window != -1) fixed_.window = positive_attribute(op.api, info, "local_window_size");
    if (fixed_.heads % fixed_.kv_heads) {
      throw InvalidWeight("attribute num_heads must be a multiple of kv_num_heads, got " +
                          std::to_string(fixed_.heads) + " and " + std::to_string(fixed_.kv_heads));
    }
  }

  void compute(OrtKernelContext* context) const {
    const Api& api = op_.api;
    const auto required = [&](size_t index) {
      std::optional<Tensor> tensor = input(api, context, index);
      if (!tensor) throw std::invalid_argument("input " + std::to_string(index) + " is missing");
      return *std::move(tensor);
    };
    const Tensor qkv = required(0), past_key = required(1), past_value = required(2), seqlens_k = required(3);
    const Tensor total = required(4), position_ids = required(5), cosines = required(6), sines = required(7);
    Attention a = fixed_;
    const int64_t parts = static_cast<int64_t>(a.heads + 2 * a.kv_heads);
    if (qkv.shape.size() != 3 || qkv.shape[2] == 0 || qkv.shape[2] % (parts * int64_t{kHeadStep})) {
      throw std::invalid_argument("qkv has shape " + to_string(qkv.shape) + ", expected [batch, tokens, " +
                                  std::to_string(parts) + " * a multiple of " + std::to_string(kHeadStep) + "]");
    }
    const int64_t batch = qkv.shape[0], tokens = qkv.shape[1], size = qkv.shape[2] / parts;
    const int64_t kv_heads = static_cast<int64_t>(a.kv_heads);
    const int64_t past_room = past_key.shape.size() == 4 ? past_key.shape[2] : 0;
    require_shape("past_key", past_key, {batch, kv_heads, past_room, size});
    require_shape("past_value", past_value, {batch, kv_heads, past_room, size});
    require_shape("seqlens_k", seqlens_k, {batch});
    require_shape("position_ids", position_ids, {batch, tokens});
    if (total.size() != 1) {
      throw std::invalid_argument("total_sequence_length has shape " + to_string(total.shape) +
                                  ", expected one number");
    }
    const int64_t table_rows = cosines.shape.empty() ? 0 : cosines.shape[0];
    require_shape("cos_cache", cosines, {table_rows, size / 2});
    require_shape("sin_cache", sines, {table_rows, size / 2});
    const auto norm_at = [&](const char* name, size_t index) -> const float* {
      if (!op_.norms) return nullptr;
      const Tensor norm = required(index);
      require_shape(name, norm, {size});
      return norm.as<float>();
    };
    a.q_norm = norm_at("q_norm", 8);
    a.k_norm = norm_at("k_norm", 9);

    const int64_t longest = *total.as<int32_t>(), room = std::max(past_room, longest);
    if (longest > past_room + tokens) {
      throw std::invalid_argument("total_sequence_length is " + std::to_string(longest) + ", more than a past of " +
                                  std::to_string(past_room) + " and " + std::to_string(tokens) + " new tokens");
    }
    a.batch = static_cast<size_t>(batch);
    a.tokens = static_cast<size_t>(tokens);
    a.head_size = static_cast<size_t>(size);
    a.past_capacity = static_cast<size_t>(past_room);
    a.capacity = static_cast<size_t>(room);
    a.table_rows = static_cast<size_t>(table_rows);
    a.qkv = qkv.as<float>();
    a.past_key = past_key.as<float>();
    a.past_value = past_value.as<float>();
    a.seqlens_k = seqlens_k.as<int32_t>();
    a.position_ids = position_ids.as<int64_t>();
    a.cosines = cosines.as<float>();
    a.sines = sines.as<float>();
    a.y = output(api, context, {batch, tokens, static_cast<int64_t>(a.heads) * size});
    a.present_key = output(api, context, {batch, kv_heads, room, size}, 1);
    a.present_value = output(api, context, {batch, kv_heads, room, size}, 2);
    Threads threads(api, context);
    cached_attention(a, kernels_, threads.parallel_for());
    threads.check_status();
  }

  const AttentionOp& op() const { return op_; }

 private:
  const AttentionOp& op_;
  const Kernels& kernels_;
  Attention fixed_;  // what the attributes say
};

}  // namespace

AttentionOp::AttentionOp(const Api& api_table, bool with_norms)
    : Op(api_table, with_norms ? "QKNormCachedAttention" : "CachedAttention", inputs_of(with_norms), 3),
      norms(with_norms) {
  use_kernel<AttentionKernel>(*this);
}

}  // namespace fips::ort
