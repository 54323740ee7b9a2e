#include "ort/matmul_op.h"

#include "kernels.h"
#include "matmul.h"
#include "ort/stored_weight.h"

namespace fips::ort {
namespace {

const char* name_of(Kind kind) {
  return kind == Kind::kDense ? "QMatMul" : kind == Kind::kNOfM ? "SparseQMatMul" : "BitmapQMatMul";
}

std::vector<Input> inputs_of(Kind kind) {
  if (kind == Kind::kDense) {
    return {{kFloat}, {kUint8}, {kFloat16}, {kFloat, kOptional}, {kUint8, kOptional}};
  }
  return {{kFloat}, {kUint8}, {kUint8}, {kFloat16}, {kFloat, kOptional}};
}

WeightInputs weight_inputs_of(Kind kind) {
  return kind == Kind::kDense ? WeightInputs{1, 0, 2, 4} : WeightInputs{1, 2, 3, 0};
}

Attributes attributes_of(const Api& api, const OrtKernelInfo* info, Kind kind) {
  const auto value = [&](const char* name) { return int_attribute(api, info, name); };
  Attributes result;
  result.k = value("K");
  result.n = value("N");
  result.trans_b = value("transB");
  result.block_size = value("block_size");
  result.segment_axis = value("segment_axis");
  result.segments = {value("size_8bit"), value("size_4bit"), value("size_3bit"), value("size_2bit")};
  result.midrise = value("midrise");
  result.accuracy_level = value("accuracy_level");
  result.keep = kind == Kind::kNOfM ? value("keep") : kind == Kind::kBitmap ? 1 : 0;
  result.of = kind == Kind::kNOfM ? value("of") : kind == Kind::kBitmap ? 1 : 0;
  return result;
}

// One node.
class MatMulKernel {
 public:
  MatMulKernel(const MatMulOp& op, const OrtKernelInfo* info)
      : op_(op), weight_(op.api, info, attributes_of(op.api, info, op.kind), weight_inputs_of(op.kind)),
        kernels_(select_kernels()) {}

  void compute(OrtKernelContext* context) const {
    const Tensor a = *input(op_.api, context, 0);
    const std::optional<Tensor> bias = input(op_.api, context, weight_inputs_of(op_.kind).scales + 1);
    WeightIndex fresh;
    const Weight weight = weight_.read(op_.api, context, fresh);
    const Layout& layout = weight_.layout();
    const int64_t k = static_cast<int64_t>(layout.trans_b ? layout.columns : layout.rows);
    const int64_t n = static_cast<int64_t>(layout.trans_b ? layout.rows : layout.columns);
    if (a.shape.empty() || a.shape.back() != k) {
      throw std::invalid_argument("A has shape " + to_string(a.shape) + ", expected [..., " + std::to_string(k) + "]");
    }
    if (bias) require_shape("bias", *bias, {n});
    std::vector<int64_t> shape = a.shape;
    shape.back() = n;
    float* y = output(op_.api, context, shape);
    Threads threads(op_.api, context);
    q_matmul(weight, a.as<float>(), a.size() / static_cast<size_t>(k), bias ? bias->as<float>() : nullptr, y, kernels_,
             threads.parallel_for());
    threads.check_status();
  }

  const MatMulOp& op() const { return op_; }

 private:
  const MatMulOp& op_;
  StoredWeight weight_;
  const Kernels& kernels_;
};

}  // namespace

MatMulOp::MatMulOp(const Api& api_table, Kind op_kind)
    : Op(api_table, name_of(op_kind), inputs_of(op_kind)), kind(op_kind) {
  use_kernel<MatMulKernel>(*this);
}

}  // namespace fips::ort
