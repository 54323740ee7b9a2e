// How the drivers run tiles, in the place of ONNX Runtime.
#pragma once

#include <cstddef>
#include <thread>

inline void run_on_one_thread(void*, size_t total, void (*fn)(void*, size_t), void* data) {
  for (size_t i = 0; i < total; ++i) fn(data, i);
}

// Last tile first on one thread, the others on another: no tile may depend on its place in the order.
inline void run_on_two_threads(void*, size_t total, void (*fn)(void*, size_t), void* data) {
  std::thread other([&] {
    for (size_t i = 0; i < total / 2; ++i) fn(data, i);
  });
  for (size_t i = total; i > total / 2; --i) fn(data, i - 1);
  other.join();
}
