// Declares the inner loops, compiled once per instruction set (kernels.cpp), and the choice among them (dispatch.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "task/attention_tile.h"
#include "task/task.h"

namespace fips {

struct Kernels {
  const char* name;
  size_t vector_floats;
  // Which kernel computes `m` rows of A: the name of its file, as in "integer/dense_few_rows". See docs/ops.md.
  const char* (*kernel_name)(const Layout& layout, size_t m);
  // Whether `tile` computes this layout in integers.
  bool (*supports_integers)(const Layout& layout, size_t m);
  // Whether it wants codes plus 128 then.
  bool (*wants_offset)(const Layout& layout, size_t m);
  size_t (*scratch_bytes)(const Task& task);
  // Computes the outputs of a range. scratch: aligned to 64 bytes.
  void (*tile)(const Task& task, const Range& range, void* scratch);
  // Rounds a block of activations (fips_ort/reference.py). A block with a value that is not finite gets the scale NaN.
  // sum: scale times the sum of the codes.
  void (*quantize_block)(const float* a, size_t size, int8_t* codes, float* scale, float* sum);
  // The largest magnitude of `count` values, as bits: those of infinities and NaNs are larger than of all others.
  int32_t (*largest_magnitude)(const float* values, size_t count);
  // A row of a dense weight, cut into segments of rows, as the floats that it stands for. out: [columns].
  void (*decode_row)(const Weight& weight, size_t row, float* out);
  // y [count]: outputs in the order of row_bits, from values in that of storage (task/merge_rows.h).
  void (*merge_rows)(const Layout& layout, const uint8_t* row_bits, size_t count, const float* values,
                     const size_t (&begins)[4], float* y);
  // y [size] = the sum of parts [count, size].
  void (*add_parts)(const float* parts, size_t count, size_t size, float* y);
  // A head of queries or keys, of a multiple of kHeadStep elements, as attention reads it (attention/heads.h).
  void (*prepare_head)(const float* x, size_t size, const float* norm, float epsilon, const float* cosines,
                       const float* sines, float factor, float* out);
  // Sums of values (attention/tile.h). scores: room for kAttentionScores.
  void (*attend)(const AttentionTile& tile, const AttentionSums& sums, float* scores);
};

// The best kernels for this CPU, or those named by the environment variable FIPS_ORT_ISA.
// Throws std::invalid_argument if that names none or some that this CPU cannot run.
const Kernels& select_kernels();

// Kernels by name; null if there are none or this CPU cannot run them.
const Kernels* find_kernels(const char* name);

}  // namespace fips
