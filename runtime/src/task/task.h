// What a kernel is asked for: one product, and the tiles that it is cut into.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weight/weight.h"

namespace fips {

// Up to so many rows of activations are few: the time goes by the bytes of weights then.
constexpr size_t kFewRows = 4;

// Rows of the stored matrix, within a segment, that products with B = S round together: a sum may be cut between them.
constexpr size_t kRun = 64;

// One product Y = A @ B (+ bias), cut into tiles that can run in any order: into ranges of outputs, or, with B = S, into
// parts of the sum, whose outputs are added afterwards.
struct Task {
  const Weight* weight;
  size_t m;
  const float* a;         // [m, K]
  const float* bias;      // [N] or null
  float* y;               // [m, N]; if the sum is cut: [parts, m, N], the bias in the first
  bool integers;          // multiply rounded activations as integers
  // With trans_b, the rounded activations.
  const int8_t* codes;    // [K / block_size, m, block_size], or the same plus 128 (Kernels::wants_offset)
  const float* scales;    // [m, block_stride]: of each block, then zeros
  const float* sums;      // [m, block_stride]: scale times the sum of the block's codes, then zeros
  size_t block_stride;    // K / block_size, rounded up to a multiple of Kernels::vector_floats
  size_t tile_outputs;    // outputs per tile
  size_t parts;           // of the sum; more than one: B = S, and every tile has all outputs

  size_t k() const { return weight->layout->trans_b ? weight->layout->columns : weight->layout->rows; }
  size_t n() const { return weight->layout->trans_b ? weight->layout->rows : weight->layout->columns; }
  const int8_t* block_codes(size_t i, size_t block) const {
    const size_t size = weight->layout->block_size;
    return codes + (block * m + i) * size;
  }
};

}  // namespace fips
