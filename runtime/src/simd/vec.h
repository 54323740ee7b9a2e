// Names the widest vectors of the instruction set this is compiled for.
#pragma once

#if defined(__AVX512VBMI2__)
#include "simd/vec64.h"
#elif defined(__AVX2__)
#include "simd/vec32.h"
#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(FIPS_PLAIN)
#include "simd/vec16_neon.h"
#else
#include "simd/vec16_plain.h"
#endif

namespace fips {
namespace FIPS_ISA {
namespace {

#if defined(__AVX512VBMI2__)
using Vec = Vec64;
#elif defined(__AVX2__)
using Vec = Vec32;
#elif defined(__ARM_NEON) && defined(__aarch64__) && !defined(FIPS_PLAIN)
using Vec = NeonVec;
#else
using Vec = PlainVec;
#endif

// A size that deserves code of its own, for a kernel's template argument; 0: any.
constexpr size_t usual(size_t size) { return Vec::kPlain ? 0 : size; }

// Sums over `count` steps, in runs that are short enough for V::Sum: calls step(i, sums) for every i below `count`, in
// order, and leaves the totals. chains: sets of sums that take turns, so that one product need not wait for the one
// before.
template <typename V, size_t chains, size_t kSums, typename Step>
inline __attribute__((always_inline)) void sum_in_runs(size_t count, size_t steps_per_run,
                                                       typename V::Ints (&totals)[kSums], Step step) {
  for (auto& total : totals) total = V::Zero(i32);
  for (size_t i = 0; i < count;) {
    const size_t end = V::kUnlimited || chains * steps_per_run >= count - i ? count : i + chains * steps_per_run;
    typename V::Sum sums[chains][kSums];
    for (auto& chain : sums) {
      for (auto& sum : chain) sum = V::ZeroSum();
    }
    for (; i + chains <= end; i += chains) {
      for (size_t chain = 0; chain < chains; ++chain) step(i + chain, sums[chain]);
    }
    if constexpr (chains > 1) {
      for (; i < end; ++i) step(i, sums[0]);
    }
    for (size_t n = 0; n < kSums; ++n) {
      for (auto& chain : sums) totals[n] = V::Add(totals[n], V::Total(chain[n]));
    }
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
