// Says what a kernel is asked for: some rows of queries, and some of the keys and values that they attend to.
#pragma once

#include <cstddef>

namespace fips {

// Of queries in a tile, at most: of one head of keys and values, those of a token one after another.
constexpr size_t kAttentionRows = 32;
// Keys whose scores are in working memory at once, and the floats that they take there.
constexpr size_t kAttentionKeys = 32;
constexpr size_t kAttentionScores = kAttentionRows * kAttentionKeys;

struct AttentionTile {
  const float* queries;  // [rows, head_size], scaled
  size_t rows;
  size_t head_size;      // a multiple of kHeadStep
  const float* keys;     // [end, head_size]; so are the values
  const float* values;
  size_t begin, end;     // keys that this tile is about
  size_t first_row;      // number of the first row among all of this head
  size_t group;          // rows of a token
  size_t past;           // keys before those of the new tokens
  size_t window;         // how many keys a query attends to at most, its own token's the last of them; 0: all
};

namespace {

// Keys that a row attends to. (In an unnamed namespace: kernels.cpp.)
inline size_t row_end(const AttentionTile& tile, size_t row) {
  return tile.past + (tile.first_row + row) / tile.group + 1;
}
inline size_t row_begin(const AttentionTile& tile, size_t row) {
  const size_t end = row_end(tile, row);
  return tile.window == 0 || end < tile.window ? 0 : end - tile.window;
}

}  // namespace

// What a tile gives: sums of values, weighted by exp(score - maximum), the sums of these weights, and the maxima. A row
// that attends to none of the tile's keys has the maximum -infinity and sums of 0.
struct AttentionSums {
  float* values;  // [rows, head_size]
  float* weights;  // [rows]
  float* maxima;  // [rows]
};

// Sizes of heads are multiples of this: both halves, which are rotated together, are whole vectors then, if need be of
// half the size.
constexpr size_t kHeadStep = 16;

}  // namespace fips
