#include "memory.h"

namespace fips {

void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<void, AlignedDelete> scratch;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    capacity = 0;
    scratch.reset(::operator new(bytes, std::align_val_t(kAlignment), std::nothrow));
    if (!scratch) return nullptr;
    capacity = bytes;
  }
  return scratch.get();
}

}  // namespace fips
