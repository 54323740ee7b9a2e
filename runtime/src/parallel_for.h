// Says how work comes to several threads.
#pragma once

#include <cstddef>

namespace fips {

// Below this many multiplications or values waking other threads costs more than it gains.
constexpr size_t kSmallestParallelWork = 1 << 16;

// Runs fn(data, i) for every i below total, in any order, perhaps at once.
struct ParallelFor {
  void (*run)(void* context, size_t total, void (*fn)(void* data, size_t i), void* data);
  void* context;
};

// Calls body(i) for every i below `count`, on several threads if that much `work` is worth it.
template <typename Body>
void for_each(size_t count, size_t work, const ParallelFor& parallel_for, Body body) {
  if (work < kSmallestParallelWork) {
    for (size_t i = 0; i < count; ++i) body(i);
    return;
  }
  parallel_for.run(
      parallel_for.context, count, [](void* data, size_t i) { (*static_cast<Body*>(data))(i); }, &body);
}

}  // namespace fips
