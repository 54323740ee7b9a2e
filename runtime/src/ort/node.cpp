#include "ort/node.h"

#include <utility>

namespace fips::ort {
namespace {

Tensor read_tensor(const Api& api, const OrtValue* value) {
  Tensor tensor{};
  check(api, api.tensor_data(value, &tensor.data));
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, api.tensor_info(value, &info));
  size_t count = 0;
  OrtStatus* status = api.dimensions_count(info, &count);
  if (!status) {
    tensor.shape.resize(count);
    status = api.dimensions(info, tensor.shape.data(), count);
  }
  api.release_tensor_info(info);
  check(api, status);
  return tensor;
}

void require_attribute(const Api& api, OrtStatus* status, const char* name, const char* kind) {
  if (!status) return;
  api.release_status(status);
  throw InvalidWeight(std::string("attribute ") + name + " is missing or no " + kind);
}

const Op& self(const CustomOp* op) { return *static_cast<const Op*>(op); }

}  // namespace

void check(const Api& api, OrtStatus* status) {
  if (!status) return;
  const std::string message = api.error_message(status);
  api.release_status(status);
  throw std::runtime_error(message);
}

size_t Tensor::size() const {
  size_t count = 1;
  for (const int64_t dimension : shape) count *= static_cast<size_t>(dimension);
  return count;
}

std::string to_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

void require_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  if (tensor.shape != expected) {
    throw InvalidWeight(std::string(name) + " has shape " + to_string(tensor.shape) + ", expected " +
                        to_string(expected));
  }
}

size_t vector_size(const char* name, const Tensor& tensor) {
  if (tensor.shape.size() != 1) throw InvalidWeight(std::string(name) + " must be a vector");
  return static_cast<size_t>(tensor.shape[0]);
}

int64_t int_attribute(const Api& api, const OrtKernelInfo* info, const char* name) {
  int64_t result = 0;
  require_attribute(api, api.int_attribute(info, name, &result), name, "integer");
  return result;
}

float float_attribute(const Api& api, const OrtKernelInfo* info, const char* name) {
  float result = 0;
  require_attribute(api, api.float_attribute(info, name, &result), name, "float");
  return result;
}

std::optional<Tensor> constant_input(const Api& api, const OrtKernelInfo* info, size_t index) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(api, api.constant_input(info, index, &is_constant, &value));
  if (!is_constant || !value) return std::nullopt;
  return read_tensor(api, value);
}

std::optional<Tensor> input(const Api& api, const OrtKernelContext* context, size_t index) {
  size_t count = 0;
  check(api, api.input_count(context, &count));
  if (index >= count) return std::nullopt;
  const OrtValue* value = nullptr;
  check(api, api.input(context, index, &value));
  if (!value) return std::nullopt;
  return read_tensor(api, value);
}

float* output(const Api& api, OrtKernelContext* context, const std::vector<int64_t>& shape, size_t index) {
  OrtValue* value = nullptr;
  check(api, api.output(context, index, shape.data(), shape.size(), &value));
  void* data = nullptr;
  check(api, api.tensor_data(value, &data));
  return static_cast<float*>(data);
}

Op::Op(const Api& api_table, const char* op_name, std::vector<Input> op_inputs, size_t op_outputs)
    : CustomOp{}, api(api_table), name(op_name), inputs(std::move(op_inputs)), outputs(op_outputs) {
  version = kApiVersion;
  get_name = [](const CustomOp* op) { return self(op).name; };
  get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };
  get_input_type = [](const CustomOp* op, size_t index) -> int { return self(op).inputs[index].type; };
  get_input_count = [](const CustomOp* op) { return self(op).inputs.size(); };
  get_output_type = [](const CustomOp*, size_t) -> int { return kFloat; };
  get_output_count = [](const CustomOp* op) { return self(op).outputs; };
  get_input_characteristic = [](const CustomOp* op, size_t index) -> int {
    return self(op).inputs[index].characteristic;
  };
  get_output_characteristic = [](const CustomOp*, size_t) -> int { return kRequired; };
  get_input_memory_type = [](const CustomOp*, size_t) { return 0; };
  get_variadic_input_min_arity = [](const CustomOp*) { return 1; };
  get_variadic_input_homogeneity = [](const CustomOp*) { return 1; };
  get_variadic_output_min_arity = [](const CustomOp*) { return 1; };
  get_variadic_output_homogeneity = [](const CustomOp*) { return 1; };
  get_start_version = [](const CustomOp*) { return 1; };
  get_end_version = [](const CustomOp*) { return 1; };
}

}  // namespace fips::ort
