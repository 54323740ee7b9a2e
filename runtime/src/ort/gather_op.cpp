#include "ort/gather_op.h"

#include "gather.h"
#include "kernels.h"
#include "ort/stored_weight.h"

namespace fips::ort {
namespace {

Attributes attributes_of(const Api& api, const OrtKernelInfo* info) {
  const auto value = [&](const char* name) { return int_attribute(api, info, name); };
  Attributes result{};
  result.k = value("K");
  result.n = value("N");
  result.trans_b = 1;
  result.block_size = value("block_size");
  result.segments = {value("size_8bit"), value("size_4bit"), value("size_3bit"), value("size_2bit")};
  result.midrise = value("midrise");
  return result;
}

// One node.
class GatherKernel {
 public:
  GatherKernel(const GatherOp& op, const OrtKernelInfo* info)
      : op_(op), weight_(op.api, info, attributes_of(op.api, info), {1, 0, 2, 3}), kernels_(select_kernels()) {}

  void compute(OrtKernelContext* context) const {
    const Tensor indices = *input(op_.api, context, 0);
    WeightIndex fresh;
    const Weight weight = weight_.read(op_.api, context, fresh);
    std::vector<int64_t> shape = indices.shape;
    shape.push_back(static_cast<int64_t>(weight_.layout().columns));
    float* y = output(op_.api, context, shape);
    Threads threads(op_.api, context);
    q_gather(weight, indices.as<int64_t>(), indices.size(), y, kernels_, threads.parallel_for());
    threads.check_status();
  }

  const GatherOp& op() const { return op_; }

 private:
  const GatherOp& op_;
  StoredWeight weight_;
  const Kernels& kernels_;
};

}  // namespace

GatherOp::GatherOp(const Api& api_table)
    : Op(api_table, "QGather", {{kInt64}, {kUint8}, {kFloat16}, {kUint8, kOptional}}) {
  use_kernel<GatherKernel>(*this);
}

}  // namespace fips::ort
