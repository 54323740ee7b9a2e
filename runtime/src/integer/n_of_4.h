// Holds what the kernels of n:m weights with groups of 4 share. A step's 16 activations are a table in a register, from
// which the index of every kept entry picks its own; so only kept entries are multiplied.
#pragma once

#include "simd/vec.h"
#include "task/outputs.h"
#include "task/task.h"
#include "weight/parts.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kStepColumns = 4 * kStepGroups;
constexpr size_t kTileVectors = kTileRows / Vec::kLanes;  // of the sums of a tile's rows
static_assert(kTileVectors * Vec::kBytes == kChunk, "a lane of a chunk's sums is a row of the tile");

bool n_of_4_supported(const Layout& layout) {
  return layout.trans_b && layout.n_of_m() && layout.of == 4 && layout.segments.front().bits < 8;
}

// What to add to the indices of a vector: where the group of every byte starts among the 16 activations.
template <typename V>
inline typename V::Bytes group_starts() {
  const uint8_t starts[4] = {0, 4, 8, 12};
  return V::LoadDup32(u8, starts);
}

// The codes and pattern of a tile, at a segment's first block.
struct TileStreams {
  const uint8_t* codes;
  const uint8_t* pattern;
};

// What tile number `tile` has in segment number `s`: visit(bits, streams, scales, first block, end of blocks, zero
// point).
template <typename Visit>
inline void with_tile(const Weight& w, size_t s, size_t tile, Visit visit) {
  const Layout& layout = *w.layout;
  const Segment& segment = layout.segments[s];
  const StreamIndex::SegmentStart& start = w.index->starts[s];
  const size_t chunks = segment.columns() / kStepColumns * layout.keep;
  with_bits(segment.bits, [&](auto width) {
    constexpr int bits = decltype(width)::kValue;
    if constexpr (bits < 8) {
      const TileStreams at{w.codes + start.codes + tile * chunks * (8 * bits),
                           w.pattern + start.pattern + tile * chunks * 16};
      const float zero_point = static_cast<float>(1 << (bits - 1)) - (layout.midrise ? 0.5f : 0.0f);
      visit(width, at, w.scales + (start.tile + tile) * layout.blocks * kTileRows,
            segment.column_begin / layout.block_size, segment.column_end / layout.block_size, zero_point);
    }
  });
}

// Calls compute(tile) for the stored tiles with outputs of a range, which begins with one. It leaves their sums in y
// [m][kTileRows], from which the outputs are written.
template <typename Compute>
inline void for_each_stored_tile(const Task& task, const Range& range, const float* y, Compute compute) {
  for (size_t row = range.first; row < range.last; row += kTileRows) {
    compute(row / kTileRows);
    write_outputs(task, row, smaller(kTileRows, range.last - row), y, kTileRows);
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
