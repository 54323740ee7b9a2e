// Reads attributes, inputs and outputs of a node, and turns errors into ONNX Runtime's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort/ort_abi.h"
#include "parallel_for.h"
#include "weight/weight.h"

namespace fips::ort {

constexpr const char* kDomain = "ai.fips";

// Turns a status into an exception, which the outermost function turns into a status again.
void check(const Api& api, OrtStatus* status);

template <typename Body>
OrtStatus* guarded(const Api& api, const char* op, Body body) {
  const std::string prefix = std::string(kDomain) + "." + op + ": ";
  try {
    body();
    return nullptr;
  } catch (const InvalidWeight& error) {
    return api.create_status(kInvalidArgument, (prefix + error.what()).c_str());
  } catch (const std::invalid_argument& error) {
    return api.create_status(kInvalidArgument, (prefix + error.what()).c_str());
  } catch (const std::exception& error) {
    return api.create_status(kFail, (prefix + error.what()).c_str());
  }
}

// Element types need no check: ONNX Runtime holds nodes to the types that the operator declares.
struct Tensor {
  void* data;
  std::vector<int64_t> shape;

  size_t size() const;
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

std::string to_string(const std::vector<int64_t>& shape);

// Throws InvalidWeight.
void require_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& expected);

// Elements of a vector. Throws InvalidWeight if it is none.
size_t vector_size(const char* name, const Tensor& tensor);

// Throw InvalidWeight if there is none.
int64_t int_attribute(const Api& api, const OrtKernelInfo* info, const char* name);
float float_attribute(const Api& api, const OrtKernelInfo* info, const char* name);

// When the session is made: nothing if the input is no initializer.
std::optional<Tensor> constant_input(const Api& api, const OrtKernelInfo* info, size_t index);

// At a run: nothing if an optional input is not connected.
std::optional<Tensor> input(const Api& api, const OrtKernelContext* context, size_t index);

float* output(const Api& api, OrtKernelContext* context, const std::vector<int64_t>& shape, size_t index = 0);

// The session's threads, for one run of a node.
class Threads {
 public:
  Threads(const Api& api, const OrtKernelContext* context) : api_(api), context_(context) {}

  ParallelFor parallel_for() {
    return {[](void* self, size_t total, void (*fn)(void*, size_t), void* data) {
              Threads& threads = *static_cast<Threads*>(self);
              if (threads.status_) return;  // of an earlier failure: nothing after it counts
              threads.status_ = threads.api_.parallel_for(threads.context_, fn, total, 0, data);
            },
            this};
  }
  // To call afterwards.
  void check_status() const { check(api_, status_); }

 private:
  const Api& api_;
  const OrtKernelContext* context_;
  OrtStatus* status_ = nullptr;
};

struct Input {
  ElementType type;
  Characteristic characteristic = kRequired;
};

// An operator whose outputs are of float32. Sessions keep pointers to operators.
struct Op : CustomOp {
  Op(const Api& api_table, const char* op_name, std::vector<Input> op_inputs, size_t op_outputs = 1);

  const Api& api;
  const char* name;
  std::vector<Input> inputs;
  size_t outputs;
};

// Lets every node of an operator be a Kernel: made of the operator and what the session says of the node, with
// compute() for a run and op(), the operator.
template <typename Kernel, typename OwnOp>
void use_kernel(OwnOp& op) {
  op.create_kernel_v2 = [](const CustomOp* base, const void*, const OrtKernelInfo* info, void** kernel) {
    const OwnOp& self = *static_cast<const OwnOp*>(base);
    return guarded(self.api, self.name, [&] { *kernel = new Kernel(self, info); });
  };
  op.compute_v2 = [](void* kernel, OrtKernelContext* context) {
    const Kernel& node = *static_cast<Kernel*>(kernel);
    return guarded(node.op().api, node.op().name, [&] { node.compute(context); });
  };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
}

}  // namespace fips::ort
