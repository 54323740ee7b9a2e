// Says what a kernel is asked for: one product, and the tiles that it is cut into.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weight/weight.h"

namespace fips {

// Up to so many rows of activations are few: the time goes by the bytes of weights then.
constexpr size_t kFewRows = 4;

// Rows of the stored matrix, within a segment, that products with B = S round together: a sum may be cut between them.
constexpr size_t kRun = 64;

// What a tile computes: outputs [first, last), or, of a sum that is cut, one part of all of them.
struct Range {
  size_t first, last;
  size_t part;
};

// One product Y = A @ B (+ bias), cut into tiles that can run in any order: into ranges of outputs, or, with B = S,
// into parts of the sum, whose outputs are added afterwards.
struct Task {
  const Weight* weight = nullptr;
  size_t m = 0;
  const float* a = nullptr;        // [m, K]
  const float* bias = nullptr;     // [N] or null
  float* y = nullptr;              // see output(); if the sum is cut: [sum_parts, m, N], the bias in the first
  size_t y_stride = 0;             // from a row of A to the next
  size_t y_first = 0;              // the output that is at y
  bool integers = false;           // multiply rounded activations as integers
  // With trans_b, the rounded activations.
  const int8_t* codes = nullptr;   // [K / block_size, m, block_size], or the same plus 128 (Kernels::wants_offset)
  const float* scales = nullptr;   // [m, block_stride]: of each block, then zeros
  const float* sums = nullptr;     // [m, block_stride]: scale times the sum of the block's codes, then zeros
  size_t block_stride = 0;         // K / block_size, rounded up to a multiple of Kernels::vector_floats
  size_t tile_outputs = 0;         // outputs per tile, at most
  size_t sum_parts = 1;            // more than one: B = S, and every tile has all outputs

  size_t k() const { return weight->layout->trans_b ? weight->layout->columns : weight->layout->rows; }
  size_t n() const { return weight->layout->trans_b ? weight->layout->rows : weight->layout->columns; }
  // Where output j of row i of A belongs.
  float* output(size_t i, size_t j) const { return y + (i * y_stride + j - y_first); }
  const int8_t* block_codes(size_t i, size_t block) const {
    const size_t size = weight->layout->block_size;
    return codes + (block * m + i) * size;
  }
};

}  // namespace fips
