// Registers the operators of domain ai.fips with ONNX Runtime.

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "ort/attention_op.h"
#include "ort/gather_op.h"
#include "ort/matmul_op.h"
#include "ort/node.h"
#include "ort/ort_abi.h"

#if defined(_WIN32)
#define FIPS_EXPORT __declspec(dllexport)
#else
#define FIPS_EXPORT __attribute__((visibility("default")))
#endif

namespace fips::ort {
namespace {

// The session option that says that the operators are registered; its value names the options they are registered with.
constexpr const char* kRegistered = "ai.fips.registered";

// The operators and their domain. Sessions keep pointers to them, so they live until the process ends.
struct Library {
  explicit Library(const void* table)
      : api(table), dense(api, Kind::kDense), n_of_m(api, Kind::kNOfM), bitmap(api, Kind::kBitmap), gather(api),
        attention(api, false), normed_attention(api, true) {}

  Api api;
  MatMulOp dense, n_of_m, bitmap;
  GatherOp gather;
  AttentionOp attention, normed_attention;
  OrtCustomOpDomain* domain = nullptr;
};

OrtStatus* create_library(const void* table, Library** result) {
  auto library = std::make_unique<Library>(table);
  const Api& api = library->api;
  if (OrtStatus* status = api.create_custom_op_domain(kDomain, &library->domain)) return status;
  const CustomOp* const ops[] = {&library->dense,  &library->n_of_m,    &library->bitmap,
                                 &library->gather, &library->attention, &library->normed_attention};
  for (const CustomOp* op : ops) {
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
void add_domain(const Api& api, OrtSessionOptions* options, OrtCustomOpDomain* domain) {
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
  const void* table = base->get_api(kApiVersion);
  if (!table) {
    // Creating a status has been the first function since the first version.
    const Api oldest(base->get_api(1));
    const std::string message = std::string("fips_ort needs ONNX Runtime 1.17 or later, this is ") +
                                base->get_version_string();
    return oldest.create_status(kFail, message.c_str());
  }
  const Api api(table);
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
}  // namespace fips::ort

extern "C" {

// The name that ONNX Runtime looks for in a library given by path.
FIPS_EXPORT OrtStatus* FIPS_ORT_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return fips::ort::register_ops(options, base);
}

// The same under a name that cannot clash where several operator libraries are linked into one program.
FIPS_EXPORT OrtStatus* FIPS_ORT_CALL FipsOrtRegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return fips::ort::register_ops(options, base);
}

}  // extern "C"
