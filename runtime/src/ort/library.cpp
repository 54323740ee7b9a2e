// Registers the operators QMatMul, SparseQMatMul and BitmapQMatMul with ONNX Runtime.

#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "matmul.h"
#include "ort/ort_abi.h"
#include "weight/weight.h"

#if defined(_WIN32)
#define FIPS_EXPORT __declspec(dllexport)
#else
#define FIPS_EXPORT __attribute__((visibility("default")))
#endif

namespace fips {
namespace {

constexpr const char* kDomain = "ai.fips";
// The session option that says that the operators are registered; its value names the options they are registered with.
constexpr const char* kRegistered = "ai.fips.registered";

// Turns a status into an exception, which the outermost function turns into a status again.
void check(const ort::Api& api, OrtStatus* status) {
  if (!status) return;
  const std::string message = api.error_message(status);
  api.release_status(status);
  throw std::runtime_error(message);
}

template <typename Body>
OrtStatus* guarded(const ort::Api& api, const char* op, Body body) {
  const std::string prefix = std::string(kDomain) + "." + op + ": ";
  try {
    body();
    return nullptr;
  } catch (const InvalidWeight& error) {
    return api.create_status(ort::kInvalidArgument, (prefix + error.what()).c_str());
  } catch (const std::invalid_argument& error) {
    return api.create_status(ort::kInvalidArgument, (prefix + error.what()).c_str());
  } catch (const std::exception& error) {
    return api.create_status(ort::kFail, (prefix + error.what()).c_str());
  }
}

struct Tensor {
  void* data;
  std::vector<int64_t> shape;

  size_t size() const {
    size_t count = 1;
    for (const int64_t dimension : shape) count *= static_cast<size_t>(dimension);
    return count;
  }
};

std::string to_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// Element types need no check: ONNX Runtime holds nodes to the types that the operator declares.
Tensor read_tensor(const ort::Api& api, const OrtValue* value) {
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

void require_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& expected) {
  if (tensor.shape != expected) {
    throw InvalidWeight(std::string(name) + " has shape " + to_string(tensor.shape) + ", expected " +
                        to_string(expected));
  }
}

size_t stream_size(const char* name, const Tensor& tensor) {
  if (tensor.shape.size() != 1) throw InvalidWeight(std::string(name) + " must be a vector");
  return static_cast<size_t>(tensor.shape[0]);
}

enum class Kind { kDense, kNOfM, kBitmap };

constexpr const char* name_of(Kind kind) {
  return kind == Kind::kDense ? "QMatMul" : kind == Kind::kNOfM ? "SparseQMatMul" : "BitmapQMatMul";
}

// One node. A weight made of initializers is checked once, here, and only its index kept: the bytes stay where
// ONNX Runtime has them, once for all nodes that read them.
class MatMulKernel {
 public:
  MatMulKernel(const ort::Api& api, const OrtKernelInfo* info, Kind kind)
      : api_(api), kind_(kind), layout_(attributes(api, info, kind)), kernels_(select_kernels()) {
    const std::optional<Tensor> codes = constant(info, 1);
    const std::optional<Tensor> pattern = layout_.sparse() ? constant(info, 2) : std::nullopt;
    const std::optional<Tensor> scales = constant(info, scales_input());
    if (scales) check_scales(*scales);
    if (codes && (pattern || !layout_.sparse())) index_.emplace(index(*codes, pattern ? &*pattern : nullptr));
  }

  void compute(OrtKernelContext* context) const {
    const Tensor a = *input(context, 0), codes = *input(context, 1), scales = *input(context, scales_input());
    std::optional<Tensor> pattern;
    if (layout_.sparse()) pattern = input(context, 2);
    const std::optional<Tensor> bias = input(context, scales_input() + 1);

    check_scales(scales);
    std::optional<StreamIndex> fresh;
    if (!index_) fresh.emplace(index(codes, pattern ? &*pattern : nullptr));
    Weight weight;
    weight.layout = &layout_;
    weight.index = index_ ? &*index_ : &*fresh;
    weight.codes = static_cast<const uint8_t*>(codes.data);
    weight.codes_size = codes.size();
    weight.pattern = pattern ? static_cast<const uint8_t*>(pattern->data) : nullptr;
    weight.scales = static_cast<const uint16_t*>(scales.data);

    const int64_t k = static_cast<int64_t>(layout_.trans_b ? layout_.columns : layout_.rows);
    const int64_t n = static_cast<int64_t>(layout_.trans_b ? layout_.rows : layout_.columns);
    if (a.shape.empty() || a.shape.back() != k) {
      throw std::invalid_argument("A has shape " + to_string(a.shape) + ", expected [..., " + std::to_string(k) + "]");
    }
    if (bias) require_shape("bias", *bias, {n});
    std::vector<int64_t> shape = a.shape;
    shape.back() = n;
    OrtValue* y = nullptr;
    check(api_, api_.output(context, 0, shape.data(), shape.size(), &y));
    void* y_data = nullptr;
    check(api_, api_.tensor_data(y, &y_data));

    struct Threads {
      const ort::Api* api;
      OrtKernelContext* context;
      OrtStatus* status;
    } threads{&api_, context, nullptr};
    const ParallelFor parallel_for{
        [](void* self, size_t total, void (*fn)(void*, size_t), void* data) {
          Threads& t = *static_cast<Threads*>(self);
          t.status = t.api->parallel_for(t.context, fn, total, 0, data);
        },
        &threads};
    q_matmul(weight, static_cast<const float*>(a.data), a.size() / static_cast<size_t>(k),
             bias ? static_cast<const float*>(bias->data) : nullptr, static_cast<float*>(y_data), kernels_,
             parallel_for);
    check(api_, threads.status);
  }

  const ort::Api& api() const { return api_; }
  const char* name() const { return name_of(kind_); }

 private:
  static Attributes attributes(const ort::Api& api, const OrtKernelInfo* info, Kind kind) {
    const auto value = [&](const char* name) {
      int64_t result = 0;
      if (OrtStatus* status = api.int_attribute(info, name, &result)) {
        api.release_status(status);
        throw InvalidWeight(std::string("attribute ") + name + " is missing or no integer");
      }
      return result;
    };
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

  size_t scales_input() const { return layout_.sparse() ? 3 : 2; }

  std::optional<Tensor> constant(const OrtKernelInfo* info, size_t index) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api_, api_.constant_input(info, index, &is_constant, &value));
    if (!is_constant || !value) return std::nullopt;
    return read_tensor(api_, value);
  }

  // Nothing if an optional input is not connected.
  std::optional<Tensor> input(const OrtKernelContext* context, size_t index) const {
    size_t count = 0;
    check(api_, api_.input_count(context, &count));
    if (index >= count) return std::nullopt;
    const OrtValue* value = nullptr;
    check(api_, api_.input(context, index, &value));
    if (!value) return std::nullopt;
    return read_tensor(api_, value);
  }

  void check_scales(const Tensor& scales) const {
    const int64_t blocks = static_cast<int64_t>(layout_.blocks);
    if (layout_.n_of_m()) {
      require_shape("scales", scales, {static_cast<int64_t>(layout_.tiles()), blocks, static_cast<int64_t>(kTileRows)});
    } else {
      require_shape("scales", scales, {static_cast<int64_t>(layout_.rows), blocks});
    }
  }

  StreamIndex index(const Tensor& codes, const Tensor* pattern) const {
    return StreamIndex(layout_, pattern ? static_cast<const uint8_t*>(pattern->data) : nullptr,
                       pattern ? stream_size("pattern", *pattern) : 0, stream_size("codes", codes));
  }

  const ort::Api& api_;
  Kind kind_;
  Layout layout_;
  const Kernels& kernels_;
  std::optional<StreamIndex> index_;
};

struct MatMulOp : ort::CustomOp {
  MatMulOp(const ort::Api& api_table, Kind op_kind) : ort::CustomOp{}, api(api_table), kind(op_kind) {
    version = ort::kApiVersion;
    get_name = [](const CustomOp* op) { return name_of(self(op).kind); };
    get_execution_provider = [](const CustomOp*) -> const char* { return nullptr; };
    get_input_type = [](const CustomOp* op, size_t index) -> int { return self(op).input_type(index); };
    get_input_count = [](const CustomOp* op) -> size_t { return self(op).kind == Kind::kDense ? 4 : 5; };
    get_output_type = [](const CustomOp*, size_t) -> int { return ort::kFloat; };
    get_output_count = [](const CustomOp*) -> size_t { return 1; };
    get_input_characteristic = [](const CustomOp* op, size_t index) -> int {
      return index + 1 == op->get_input_count(op) ? ort::kOptional : ort::kRequired;
    };
    get_output_characteristic = [](const CustomOp*, size_t) -> int { return ort::kRequired; };
    get_input_memory_type = [](const CustomOp*, size_t) { return 0; };
    get_variadic_input_min_arity = [](const CustomOp*) { return 1; };
    get_variadic_input_homogeneity = [](const CustomOp*) { return 1; };
    get_variadic_output_min_arity = [](const CustomOp*) { return 1; };
    get_variadic_output_homogeneity = [](const CustomOp*) { return 1; };
    get_start_version = [](const CustomOp*) { return 1; };
    get_end_version = [](const CustomOp*) { return 1; };
    create_kernel_v2 = [](const CustomOp* op, const void*, const OrtKernelInfo* info, void** kernel) {
      const MatMulOp& matmul = self(op);
      return guarded(matmul.api, op->get_name(op),
                     [&] { *kernel = new MatMulKernel(matmul.api, info, matmul.kind); });
    };
    compute_v2 = [](void* kernel, OrtKernelContext* context) {
      const MatMulKernel& matmul = *static_cast<MatMulKernel*>(kernel);
      return guarded(matmul.api(), matmul.name(), [&] { matmul.compute(context); });
    };
    destroy = [](void* kernel) { delete static_cast<MatMulKernel*>(kernel); };
  }

  static const MatMulOp& self(const CustomOp* op) { return *static_cast<const MatMulOp*>(op); }

  int input_type(size_t index) const {
    const size_t scales = kind == Kind::kDense ? 2 : 3;
    if (index == 0 || index > scales) return ort::kFloat;
    return index == scales ? ort::kFloat16 : ort::kUint8;
  }

  const ort::Api& api;
  Kind kind;
};

// The operators and their domain. Sessions keep pointers to them, so they live until the process ends.
struct Library {
  explicit Library(const void* table)
      : api(table), dense(api, Kind::kDense), n_of_m(api, Kind::kNOfM), bitmap(api, Kind::kBitmap) {}

  ort::Api api;
  MatMulOp dense, n_of_m, bitmap;
  OrtCustomOpDomain* domain = nullptr;
};

OrtStatus* create_library(const void* table, Library** result) {
  auto library = std::make_unique<Library>(table);
  const ort::Api& api = library->api;
  if (OrtStatus* status = api.create_custom_op_domain(kDomain, &library->domain)) return status;
  for (const MatMulOp* op : {&library->dense, &library->n_of_m, &library->bitmap}) {
    if (OrtStatus* status = api.add_custom_op(library->domain, op)) {
      api.release_custom_op_domain(library->domain);
      return status;
    }
  }
  *result = library.release();
  return nullptr;
}

// Registered twice, the domain would make every session fail. Another copy of this library may have done it, so the
// options themselves remember. The address is there because clones of options have their entries, but no domains.
void add_domain(const ort::Api& api, OrtSessionOptions* options, OrtCustomOpDomain* domain) {
  const std::string self = std::to_string(reinterpret_cast<uintptr_t>(options));
  int found = 0;
  check(api, api.has_session_config_entry(options, kRegistered, &found));
  if (found) {
    size_t size = 0;
    check(api, api.session_config_entry(options, kRegistered, nullptr, &size));
    std::string value(size, '\0');
    check(api, api.session_config_entry(options, kRegistered, value.data(), &size));
    if (value.c_str() == self) return;
  }
  check(api, api.add_custom_op_domain(options, domain));
  check(api, api.add_session_config_entry(options, kRegistered, self.c_str()));
}

OrtStatus* register_ops(OrtSessionOptions* options, const OrtApiBase* base) noexcept {
  const void* table = base->get_api(ort::kApiVersion);
  if (!table) {
    // Creating a status has been the first function since the first version.
    const ort::Api oldest(base->get_api(1));
    const std::string message = std::string("fips_ort needs ONNX Runtime 1.17 or later, this is ") +
                                base->get_version_string();
    return oldest.create_status(ort::kFail, message.c_str());
  }
  const ort::Api api(table);
  return guarded(api, "register", [&] {
    static std::mutex mutex;
    static std::vector<std::pair<const void*, Library*>> libraries;  // per ONNX Runtime in the process
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [known, library] : libraries) {
      if (known == table) return add_domain(api, options, library->domain);
    }
    Library* library = nullptr;
    check(api, create_library(table, &library));
    libraries.emplace_back(table, library);
    add_domain(api, options, library->domain);
  });
}

}  // namespace
}  // namespace fips

extern "C" {

// The name that ONNX Runtime looks for in a library given by path.
FIPS_EXPORT OrtStatus* FIPS_ORT_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return fips::register_ops(options, base);
}

// The same under a name that cannot clash where several operator libraries are linked into one program.
FIPS_EXPORT OrtStatus* FIPS_ORT_CALL FipsOrtRegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return fips::register_ops(options, base);
}

}  // extern "C"
