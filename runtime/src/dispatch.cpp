// Finds out which instruction sets this CPU has, and chooses among their kernels.

#if defined(FIPS_X86)
#include <cpuid.h>
#elif defined(FIPS_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fips {

namespace generic {
extern const Kernels kKernels;
}
#if defined(FIPS_X86)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#elif defined(FIPS_ARM64)
namespace neon {
extern const Kernels kKernels;
}
namespace neon_dotprod {
extern const Kernels kKernels;
}
#endif

namespace {

#if defined(FIPS_X86)
// Not every compiler's __builtin_cpu_supports knows "f16c".
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#elif defined(FIPS_ARM64)
bool has_dot_product() {
#if defined(__APPLE__)
  return true;  // every 64-bit Arm CPU of Apple's Macs
#elif defined(__linux__)
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProduct) != 0;
#else
  return false;
#endif
}
#endif

struct InstructionSet {
  const Kernels* kernels;
  bool (*supported)();
};

// Best first.
const InstructionSet kInstructionSets[] = {
#if defined(FIPS_X86)
    {&avx512::kKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
              __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2") &&
              __builtin_cpu_supports("fma") && has_f16c();
     }},
    {&avx2::kKernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
              has_f16c();
     }},
#elif defined(FIPS_ARM64)
    {&neon_dotprod::kKernels, has_dot_product},
    {&neon::kKernels, [] { return true; }},
#endif
    {&generic::kKernels, [] { return true; }},
};

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if (std::strcmp(set.kernels->name, name) == 0) return set.supported() ? set.kernels : nullptr;
  }
  return nullptr;
}

const Kernels& select_kernels() {
  if (const char* name = std::getenv("FIPS_ORT_ISA")) {
    if (const Kernels* kernels = find_kernels(name)) return *kernels;
    std::string runnable;
    for (const InstructionSet& set : kInstructionSets) {
      if (set.supported()) runnable += std::string(runnable.empty() ? "" : ", ") + set.kernels->name;
    }
    throw std::invalid_argument(std::string("FIPS_ORT_ISA=") + name + ": unknown, or this CPU lacks it; it has " +
                                runnable);
  }
  for (const InstructionSet& set : kInstructionSets) {
    if (set.supported()) return *set.kernels;
  }
  return generic::kKernels;
}

}  // namespace fips
