// Multiplies few rows of rounded activations with an n:m weight with groups of 4, B = S.T, of which the packed chunks
// are read directly.
#pragma once

#include "integer/n_of_4.h"
#include "integer/n_of_4_halves.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kFewTileRows = 2;

bool n_of_4_few_rows_supported(const Layout& layout, size_t m) { return m <= kFewTileRows && n_of_4_supported(layout); }

// acc += the products of `rows` rows of A with the 16 rows of a tile, over the blocks of one segment. scales: of the
// tile. kSteps: of a block, if known at compile time, else 0.
template <int bits, size_t keep, size_t rows, size_t kSteps>
void tile_dot_vectors(const Task& task, size_t i, TileStreams at, const uint16_t* scales, size_t block_begin,
                    size_t block_end, float bias, Vec::Floats (&acc)[rows][kTileVectors]) {
  const Layout& layout = *task.weight->layout;
  const size_t steps = kSteps ? kSteps : layout.block_size / kStepColumns;
  const Vec::Bytes starts = group_starts<Vec>(), ones = Vec::Set(u8, 1), place_bits = Vec::Set(u8, 3);
  for (size_t block = block_begin; block < block_end; ++block) {
    const int8_t* a = task.block_codes(i, block);
    // Sums of level times activation, then of the activations that were picked.
    constexpr size_t kSums = rows * kTileVectors;
    Vec::Ints totals[2 * kSums];
    constexpr size_t kChains = rows == 1 ? 2 : 1, kStepsPerRun = Vec::Capacity((1 << bits) - 1, 127) / keep;
    sum_in_runs<Vec, kChains>(steps, kStepsPerRun, totals, [&](size_t step, auto& sums) {
      Vec::Bytes tables[rows];
      for (size_t r = 0; r < rows; ++r) tables[r] = Vec::LoadDup128(u8, a + (r * steps + step) * kStepColumns);
#pragma GCC unroll 2
      for (size_t slot = 0; slot < keep; ++slot, at.codes += 8 * bits, at.pattern += 16) {
#pragma GCC unroll 4
        for (size_t v = 0; v < kTileVectors; ++v) {
          const Vec::Bytes index = Vec::AndOr(Vec::UnpackPairs(at.pattern, v), place_bits, starts);
          const Vec::Bytes levels = Vec::UnpackChunk<bits>(at.codes, v);
          for (size_t r = 0; r < rows; ++r) {
            const Vec::Bytes picked = Vec::TableLookupBytes(tables[r], index);
            Vec::Accumulate(sums[r * kTileVectors + v], levels, picked);
            Vec::Accumulate(sums[kSums + r * kTileVectors + v], ones, picked);
          }
        }
      }
    });
    prefetch_lines(at.codes, steps * keep * 8 * bits);
    prefetch_lines(at.pattern, steps * keep * 16);
    for (size_t v = 0; v < kTileVectors; ++v) {
      const Vec::Floats scale = Vec::PromoteTo(f32, Vec::LoadU(f16, scales + block * kTileRows + v * Vec::kLanes));
      for (size_t r = 0; r < rows; ++r) {
        const size_t n = r * kTileVectors + v;
        const Vec::Floats product = Vec::Mul(scale, Vec::Set(f32, task.scales[(i + r) * task.block_stride + block]));
        const Vec::Floats level_sum =
            Vec::MulAdd(Vec::ConvertTo(f32, totals[kSums + n]), Vec::Set(f32, -bias), Vec::ConvertTo(f32, totals[n]));
        acc[r][v] = Vec::MulAdd(level_sum, product, acc[r][v]);
      }
    }
  }
}

template <int bits, size_t keep, size_t rows, size_t kSteps>
constexpr auto tile_dot_steps() {
  if constexpr (kUseHalves) {
    return tile_dot_halves<Vec, bits, keep, rows, kSteps>;
  } else {
    return tile_dot_vectors<bits, keep, rows, kSteps>;
  }
}

template <int bits, size_t keep, size_t rows>
void tile_dot(const Task& task, size_t i, TileStreams at, const uint16_t* scales, size_t block_begin, size_t block_end,
              float bias, Vec::Floats (&acc)[rows][kTileVectors]) {
  (task.weight->layout->block_size == 8 * kStepColumns ? tile_dot_steps<bits, keep, rows, usual(8)>()
                                                       : tile_dot_steps<bits, keep, rows, 0>())(
      task, i, at, scales, block_begin, block_end, bias, acc);
}

// The tile's outputs for all of at most kFewTileRows rows of A, to y.
template <size_t rows>
void few_rows_of_tile(const Task& task, size_t tile, float* y) {
  Vec::Floats acc[rows][kTileVectors];
  for (size_t r = 0; r < rows; ++r) {
    for (size_t v = 0; v < kTileVectors; ++v) acc[r][v] = Vec::Zero(f32);
  }
  for (size_t s = 0; s < task.weight->layout->segments.size(); ++s) {
    with_tile(*task.weight, s, tile, [&](auto width, auto... rest) {
      constexpr int bits = decltype(width)::kValue;
      (task.weight->layout->keep == 1 ? tile_dot<bits, 1, rows> : tile_dot<bits, 2, rows>)(task, 0, rest..., acc);
    });
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t v = 0; v < kTileVectors; ++v) Vec::StoreU(acc[r][v], y + r * kTileRows + v * Vec::kLanes);
  }
}

size_t n_of_4_few_rows_scratch_bytes(const Task& task) { return task.m * kTileRows * sizeof(float); }

void n_of_4_few_rows_tile(const Task& task, const Range& range, void* scratch) {
  float* y = static_cast<float*>(scratch);
  for_each_stored_tile(task, range, y, [&](size_t tile) {
    (task.m == 1 ? few_rows_of_tile<1> : few_rows_of_tile<2>)(task, tile, y);
  });
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
