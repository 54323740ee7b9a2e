// Declares the part of ONNX Runtime's C interface that a custom operator library needs. It only ever grows at its
// end, so functions are named by their place in its table; every place is in all versions from kApiVersion on.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define FIPS_ORT_CALL __stdcall
#else
#define FIPS_ORT_CALL
#endif

extern "C" {

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtTensorTypeAndShapeInfo;

struct OrtApiBase {
  const void* (FIPS_ORT_CALL* get_api)(uint32_t version);  // null if this ONNX Runtime is older than `version`
  const char* (FIPS_ORT_CALL* get_version_string)();
};

}  // extern "C"

namespace fips::ort {

// ONNX Runtime 1.17.
constexpr uint32_t kApiVersion = 17;

constexpr int kFail = 1;
constexpr int kInvalidArgument = 2;

enum ElementType : int { kFloat = 1, kUint8 = 2, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// The table of functions. All of those used here return null on success unless noted.
class Api {
 public:
  explicit Api(const void* table) : table_(static_cast<const void* const*>(table)) {}

  OrtStatus* create_status(int code, const char* message) const {
    return call<OrtStatus*, int, const char*>(0, code, message);
  }
  const char* error_message(const OrtStatus* status) const { return call<const char*, const OrtStatus*>(2, status); }
  void release_status(OrtStatus* status) const { call<void, OrtStatus*>(93, status); }

  OrtStatus* create_custom_op_domain(const char* name, OrtCustomOpDomain** domain) const {
    return call<OrtStatus*, const char*, OrtCustomOpDomain**>(26, name, domain);
  }
  OrtStatus* add_custom_op(OrtCustomOpDomain* domain, const struct CustomOp* op) const {
    return call<OrtStatus*, OrtCustomOpDomain*, const CustomOp*>(27, domain, op);
  }
  OrtStatus* add_custom_op_domain(OrtSessionOptions* options, OrtCustomOpDomain* domain) const {
    return call<OrtStatus*, OrtSessionOptions*, OrtCustomOpDomain*>(28, options, domain);
  }
  OrtStatus* add_session_config_entry(OrtSessionOptions* options, const char* key, const char* value) const {
    return call<OrtStatus*, OrtSessionOptions*, const char*, const char*>(130, options, key, value);
  }
  OrtStatus* has_session_config_entry(const OrtSessionOptions* options, const char* key, int* found) const {
    return call<OrtStatus*, const OrtSessionOptions*, const char*, int*>(237, options, key, found);
  }
  // `size`: of `value` with its final zero, in and out.
  OrtStatus* session_config_entry(const OrtSessionOptions* options, const char* key, char* value, size_t* size) const {
    return call<OrtStatus*, const OrtSessionOptions*, const char*, char*, size_t*>(238, options, key, value, size);
  }
  void release_custom_op_domain(OrtCustomOpDomain* domain) const { call<void, OrtCustomOpDomain*>(101, domain); }

  OrtStatus* tensor_data(const OrtValue* value, void** data) const {
    return call<OrtStatus*, const OrtValue*, void**>(51, value, data);
  }
  OrtStatus* tensor_info(const OrtValue* value, OrtTensorTypeAndShapeInfo** info) const {
    return call<OrtStatus*, const OrtValue*, OrtTensorTypeAndShapeInfo**>(65, value, info);
  }
  OrtStatus* element_type(const OrtTensorTypeAndShapeInfo* info, int* type) const {
    return call<OrtStatus*, const OrtTensorTypeAndShapeInfo*, int*>(60, info, type);
  }
  OrtStatus* dimensions_count(const OrtTensorTypeAndShapeInfo* info, size_t* count) const {
    return call<OrtStatus*, const OrtTensorTypeAndShapeInfo*, size_t*>(61, info, count);
  }
  OrtStatus* dimensions(const OrtTensorTypeAndShapeInfo* info, int64_t* values, size_t count) const {
    return call<OrtStatus*, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t>(62, info, values, count);
  }
  void release_tensor_info(OrtTensorTypeAndShapeInfo* info) const { call<void, OrtTensorTypeAndShapeInfo*>(99, info); }

  OrtStatus* float_attribute(const OrtKernelInfo* info, const char* name, float* value) const {
    return call<OrtStatus*, const OrtKernelInfo*, const char*, float*>(85, info, name, value);
  }
  OrtStatus* int_attribute(const OrtKernelInfo* info, const char* name, int64_t* value) const {
    return call<OrtStatus*, const OrtKernelInfo*, const char*, int64_t*>(86, info, name, value);
  }
  OrtStatus* constant_input(const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** value) const {
    return call<OrtStatus*, const OrtKernelInfo*, size_t, int*, const OrtValue**>(249, info, index, is_constant,
                                                                                  value);
  }
  OrtStatus* input_count(const OrtKernelContext* context, size_t* count) const {
    return call<OrtStatus*, const OrtKernelContext*, size_t*>(88, context, count);
  }
  OrtStatus* input(const OrtKernelContext* context, size_t index, const OrtValue** value) const {
    return call<OrtStatus*, const OrtKernelContext*, size_t, const OrtValue**>(90, context, index, value);
  }
  OrtStatus* output(OrtKernelContext* context, size_t index, const int64_t* dimensions, size_t count,
                    OrtValue** value) const {
    return call<OrtStatus*, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**>(91, context, index,
                                                                                           dimensions, count, value);
  }
  // Runs fn(data, i) for i below `total` on the session's threads; batches 0: as many as there are threads.
  OrtStatus* parallel_for(const OrtKernelContext* context, void (*fn)(void*, size_t), size_t total, size_t batches,
                          void* data) const {
    return call<OrtStatus*, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*>(
        274, context, fn, total, batches, data);
  }

 private:
  template <typename Result, typename... Arguments>
  Result call(size_t place, Arguments... arguments) const {
    using Function = Result(FIPS_ORT_CALL*)(Arguments...);
    return reinterpret_cast<Function>(const_cast<void*>(table_[place]))(arguments...);
  }

  const void* const* table_;
};

// What ONNX Runtime calls for one operator type, in the order it expects.
struct CustomOp {
  uint32_t version;
  void*(FIPS_ORT_CALL* create_kernel)(const CustomOp*, const void*, const OrtKernelInfo*);
  const char*(FIPS_ORT_CALL* get_name)(const CustomOp*);
  const char*(FIPS_ORT_CALL* get_execution_provider)(const CustomOp*);  // null: CPU
  int(FIPS_ORT_CALL* get_input_type)(const CustomOp*, size_t);
  size_t(FIPS_ORT_CALL* get_input_count)(const CustomOp*);
  int(FIPS_ORT_CALL* get_output_type)(const CustomOp*, size_t);
  size_t(FIPS_ORT_CALL* get_output_count)(const CustomOp*);
  void(FIPS_ORT_CALL* compute)(void*, OrtKernelContext*);
  void(FIPS_ORT_CALL* destroy)(void*);
  int(FIPS_ORT_CALL* get_input_characteristic)(const CustomOp*, size_t);
  int(FIPS_ORT_CALL* get_output_characteristic)(const CustomOp*, size_t);
  int(FIPS_ORT_CALL* get_input_memory_type)(const CustomOp*, size_t);  // 0: the device's default
  int(FIPS_ORT_CALL* get_variadic_input_min_arity)(const CustomOp*);
  int(FIPS_ORT_CALL* get_variadic_input_homogeneity)(const CustomOp*);
  int(FIPS_ORT_CALL* get_variadic_output_min_arity)(const CustomOp*);
  int(FIPS_ORT_CALL* get_variadic_output_homogeneity)(const CustomOp*);
  // From version 16 on these two are called instead of create_kernel and compute.
  OrtStatus*(FIPS_ORT_CALL* create_kernel_v2)(const CustomOp*, const void*, const OrtKernelInfo*, void**);
  OrtStatus*(FIPS_ORT_CALL* compute_v2)(void*, OrtKernelContext*);
  OrtStatus*(FIPS_ORT_CALL* infer_output_shape)(const CustomOp*, void*);  // may be null
  int(FIPS_ORT_CALL* get_start_version)(const CustomOp*);
  int(FIPS_ORT_CALL* get_end_version)(const CustomOp*);
  size_t(FIPS_ORT_CALL* get_may_inplace)(int**, int**);
  void(FIPS_ORT_CALL* release_may_inplace)(int*, int*);
  size_t(FIPS_ORT_CALL* get_alias_map)(int**, int**);
  void(FIPS_ORT_CALL* release_alias_map)(int*, int*);
};

}  // namespace fips::ort
