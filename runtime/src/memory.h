// Working memory that vectors can be loaded from.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace fips {

constexpr size_t kAlignment = 64;

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(kAlignment)); }
};

// Throws std::bad_alloc.
template <typename T>
class AlignedArray {
 public:
  explicit AlignedArray(size_t size)
      : memory_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(kAlignment)))) {}
  T* get() const { return memory_.get(); }

 private:
  std::unique_ptr<T, AlignedDelete> memory_;
};

// A thread's working memory, kept between calls; null if there is no memory.
void* thread_scratch(size_t bytes);

}  // namespace fips
