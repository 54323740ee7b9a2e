// The inner loops, compiled once per instruction set (kernels.cpp), and the choice among them (dispatch.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "weight.h"

namespace fips {

// One product Y = A @ B (+ bias), cut into tiles of outputs that can run in any order.
struct Task {
  const Weight* weight;
  size_t m;
  const float* a;         // [m, a_stride]; zeros from K to the next multiple of Kernels::vector_floats
  size_t a_stride;
  const float* bias;      // [N] or null
  float* y;               // [m, N]
  // Rounded activations: with `codes` the tiles multiply integers instead of `a`.
  const int8_t* codes;    // [m, K] or null
  const float* scales;    // [m, block_stride]: of each block, then zeros
  const float* sums;      // [m, block_stride]: scale times the sum of the block's codes, then zeros
  size_t block_stride;    // K / block_size, rounded up to a multiple of Kernels::vector_floats
  size_t tile_outputs;    // outputs per tile
};

struct Kernels {
  const char* name;
  size_t vector_floats;
  // Whether `tile` can multiply rounded activations as integers with this layout.
  bool (*supports_integers)(const Layout& layout);
  size_t (*scratch_bytes)(const Task& task);
  // Computes outputs [tile * tile_outputs, ...). scratch: aligned to 64 bytes.
  void (*tile)(const Task& task, size_t tile, void* scratch);
  // Rounds one row of activations in blocks (fips_ort/reference.py). A block with a value that is not finite gets
  // the scale NaN. codes: [columns]; scales, sums: [columns / block_size].
  void (*quantize_row)(const float* a, size_t columns, size_t block_size, int8_t* codes, float* scales, float* sums);
};

// The best kernels for this CPU, or those named by the environment variable FIPS_ORT_ISA.
// Throws std::invalid_argument if that names none or some that this CPU cannot run.
const Kernels& select_kernels();

// Kernels by name; null if there are none or this CPU cannot run them.
const Kernels* find_kernels(const char* name);

}  // namespace fips
