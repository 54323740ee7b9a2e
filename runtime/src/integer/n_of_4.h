// Rounded activations times an n:m weight with groups of 4, B = S.T. A step's 16 activations are a table in a register,
// from which the index of every kept entry picks its own; so only kept entries are multiplied. Few rows of activations
// read the packed chunks directly; many share a block of weights that has been unpacked.
#pragma once

#include "decode/decode.h"
#include "integer/n_of_4_few_rows.h"
#include "simd/vec.h"
#include "task/outputs.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kFewTileRows = 2;
constexpr size_t kUnpackedRows = Vec::kRegisters == 32 ? 4 : 3;  // rows of activations at a time: many rows

bool tiles_supported(const Layout& layout, size_t) {
  return layout.trans_b && layout.n_of_m() && layout.of == 4 && layout.segments.front().bits < 8;
}

// Whether `m` rows of activations are wanted as unsigned bytes, 128 more than their codes.
bool tiles_want_offset(size_t m) { return !Vec::kBothSigned && m > kFewTileRows; }

// --- many rows -------------------------------------------------------------------------------------------------

// A block of a tile: for every chunk 64 indices among the step's 16 activations, and 64 signed levels, doubled if
// midrise.
struct UnpackedBlock {
  uint8_t* index;
  uint8_t* levels;
  float offsets[kTileRows];  // of each row: 128 times the sum of its levels if activations are unsigned, else 0
};

template <int bits>
void unpack_block(TileStreams at, size_t chunks, bool midrise, UnpackedBlock& block) {
  const Vec::Bytes starts = group_starts<Vec>(), ones = Vec::fill(1);
  const int zero_point = midrise ? (1 << bits) - 1 : 1 << (bits - 1);
  const Vec::Bytes minus_zero = Vec::fill(static_cast<uint8_t>(-zero_point));
  Vec::Ints sums[kParts];
  for (size_t v = 0; v < kParts; ++v) sums[v] = Vec::zero_ints();
  for (size_t chunk = 0; chunk < chunks; ++chunk) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kParts; ++v) {
      const size_t place = chunk * kChunk + v * Vec::kBytes;
      Vec::store(block.index + place, Vec::bit_or(Vec::chunk<2>(at.pattern + 16 * chunk, v), starts));
      Vec::Bytes levels = Vec::chunk<bits>(at.codes + 8 * bits * chunk, v);
      if (midrise) levels = Vec::add(levels, levels);
      levels = Vec::add(levels, minus_zero);
      Vec::store(block.levels + place, levels);
      sums[v] = Vec::dot(sums[v], ones, levels);
    }
  }
  const float offset = Vec::kBothSigned ? 0.0f : 128.0f;
  for (size_t v = 0; v < kParts; ++v) {
    Vec::store_floats(block.offsets + v * Vec::kLanes,
                      Vec::multiply(Vec::floats(sums[v]), Vec::set(offset)));
  }
}

// y [rows][kTileRows] += the products of `rows` rows of A with an unpacked block. scales: of the tile's rows.
template <int bits, size_t keep, size_t rows>
void unpacked_kernel(const Task& task, size_t i, size_t block, const UnpackedBlock& unpacked, const float* scales,
                     float* y) {
  const Layout& layout = *task.weight->layout;
  const size_t steps = layout.block_size / kStepColumns;
  const int8_t* a = task.block_codes(i, block);
  Vec::Ints totals[rows * kParts];
  sum_in_runs<Vec, 1>(steps, Vec::adds(255, (1 << bits) - 1) / keep, totals, [&](size_t step, auto& sums) {
    Vec::Bytes tables[rows];
    for (size_t r = 0; r < rows; ++r) tables[r] = Vec::repeat16(a + (r * steps + step) * kStepColumns);
#pragma GCC unroll 2
    for (size_t slot = 0; slot < keep; ++slot) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kParts; ++v) {
        const size_t place = (step * keep + slot) * kChunk + v * Vec::kBytes;
        const Vec::Bytes index = Vec::load(unpacked.index + place), levels = Vec::load(unpacked.levels + place);
        for (size_t r = 0; r < rows; ++r) Vec::add(sums[r * kParts + v], Vec::select(tables[r], index), levels);
      }
    }
  });
  for (size_t v = 0; v < kParts; ++v) {
    const Vec::Floats scale = Vec::load_floats(scales + v * Vec::kLanes);
    const Vec::Floats offset = Vec::load_floats(unpacked.offsets + v * Vec::kLanes);
    for (size_t r = 0; r < rows; ++r) {
      const Vec::Floats a_scale = Vec::set(task.scales[(i + r) * task.block_stride + block]);
      const Vec::Floats level_sum = Vec::multiply_add(offset, Vec::set(-1.0f), Vec::floats(totals[r * kParts + v]));
      float* out = y + r * kTileRows + v * Vec::kLanes;
      Vec::store_floats(out, Vec::multiply_add(Vec::multiply(level_sum, a_scale), scale, Vec::load_floats(out)));
    }
  }
}

template <int bits, size_t keep>
void tile_many_rows(const Task& task, TileStreams at, const uint16_t* scales, size_t block_begin, size_t block_end,
                    UnpackedBlock& unpacked, float* y) {
  const Layout& layout = *task.weight->layout;
  const size_t chunks = layout.block_size / kStepColumns * keep;
  for (size_t block = block_begin; block < block_end; ++block) {
    unpack_block<bits>(at, chunks, layout.midrise, unpacked);
    at.codes += chunks * 8 * bits;
    at.pattern += chunks * 16;
    float row_scales[kTileRows];
    const float unit = layout.midrise ? 0.5f : 1.0f;
    for (size_t row = 0; row < kTileRows; ++row) {
      row_scales[row] = unit * float_from_half(scales[block * kTileRows + row]);
    }
    size_t i = 0;
    for (; i + kUnpackedRows <= task.m; i += kUnpackedRows) {
      unpacked_kernel<bits, keep, kUnpackedRows>(task, i, block, unpacked, row_scales, y + i * kTileRows);
    }
    for (; i < task.m; ++i) unpacked_kernel<bits, keep, 1>(task, i, block, unpacked, row_scales, y + i * kTileRows);
  }
}

// --- tiles -----------------------------------------------------------------------------------------------------

// Working memory: an unpacked block, and the outputs of a tile, [m][kTileRows].
struct TileScratch {
  UnpackedBlock unpacked;
  float* y;
};

size_t unpacked_bytes(const Layout& layout) { return layout.block_size / kStepColumns * layout.keep * kChunk; }

size_t tiles_scratch_bytes(const Task& task) {
  return 2 * unpacked_bytes(*task.weight->layout) + task.m * kTileRows * sizeof(float);
}

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

// The tile's outputs for all of at most kFewTileRows rows of A, from segments [first, last), to y.
template <size_t rows>
void few_rows_of_tile(const Task& task, size_t first, size_t last, size_t tile, float* y) {
  Vec::Floats acc[rows][kParts];
  for (size_t r = 0; r < rows; ++r) {
    for (size_t v = 0; v < kParts; ++v) acc[r][v] = Vec::zero();
  }
  for (size_t s = first; s < last; ++s) {
    with_tile(*task.weight, s, tile, [&](auto width, auto... rest) {
      constexpr int bits = decltype(width)::kValue;
      (task.weight->layout->keep == 1 ? tile_dot<bits, 1, rows> : tile_dot<bits, 2, rows>)(task, 0, rest..., acc);
    });
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t v = 0; v < kParts; ++v) Vec::store_floats(y + r * kTileRows + v * Vec::kLanes, acc[r][v]);
  }
}

// The outputs of tile number `tile` of segment `own` (of its rows; of all rows, if the columns are cut), to scratch.y.
void compute_tile(const Task& task, size_t own, size_t tile, TileScratch& scratch) {
  const Layout& layout = *task.weight->layout;
  const size_t first = layout.columns_cut ? 0 : own, last = layout.columns_cut ? layout.segments.size() : own + 1;
  if (task.m == 1) return few_rows_of_tile<1>(task, first, last, tile, scratch.y);
  if (task.m == 2) return few_rows_of_tile<2>(task, first, last, tile, scratch.y);
  std::memset(scratch.y, 0, task.m * kTileRows * sizeof(float));
  for (size_t s = first; s < last; ++s) {
    with_tile(*task.weight, s, tile, [&](auto width, TileStreams at, auto* scales, size_t begin, size_t end, float) {
      constexpr int bits = decltype(width)::kValue;
      const auto many_rows = layout.keep == 1 ? tile_many_rows<bits, 1> : tile_many_rows<bits, 2>;
      many_rows(task, at, scales, begin, end, scratch.unpacked, scratch.y);
    });
  }
}

void tiles_tile(const Task& task, size_t tile, void* memory) {
  const Layout& layout = *task.weight->layout;
  uint8_t* bytes = static_cast<uint8_t*>(memory);
  uint8_t* levels = bytes + unpacked_bytes(layout);
  TileScratch scratch{{bytes, levels, {}}, reinterpret_cast<float*>(levels + unpacked_bytes(layout))};
  const size_t first = tile * task.tile_outputs, last = smaller(first + task.tile_outputs, layout.rows);
  for (size_t s = 0; s < (layout.columns_cut ? 1 : layout.segments.size()); ++s) {
    const size_t row_begin = layout.segments[s].row_begin;
    const size_t begin = larger(first, row_begin), end = smaller(last, layout.segments[s].row_end);
    for (size_t row = begin; row < end;) {
      const size_t stored = (row - row_begin) / kTileRows;
      const size_t tile_begin = row_begin + stored * kTileRows, tile_end = smaller(tile_begin + kTileRows, end);
      compute_tile(task, s, stored, scratch);
      write_outputs(task, row, tile_end - row, scratch.y + (row - tile_begin), kTileRows);
      row = tile_end;
    }
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
