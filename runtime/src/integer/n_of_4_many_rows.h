// Multiplies many rows of rounded activations with an n:m weight with groups of 4, B = S.T: they share a block of
// weights that has been unpacked.
#pragma once

#include "decode/decode.h"
#include "integer/n_of_4.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kUnpackedRows = Vec::kRegisters == 32 ? 4 : 3;  // rows of activations at a time
// Whether the kernel wants activations as unsigned bytes, 128 more than their codes.
constexpr bool kWantsOffset = !Vec::kBothSigned;

bool n_of_4_many_rows_supported(const Layout& layout, size_t) { return n_of_4_supported(layout); }

// A block of a tile: for every chunk 64 indices among the step's 16 activations, and 64 signed levels, doubled if
// midrise.
struct UnpackedBlock {
  uint8_t* index;
  uint8_t* levels;
  float offsets[kTileRows];  // of each row: 128 times the sum of its levels if activations are unsigned, else 0
};

template <int bits>
void unpack_block(TileStreams at, size_t chunks, bool midrise, UnpackedBlock& block) {
  const Vec::Bytes starts = group_starts<Vec>(), ones = Vec::Set(u8, 1);
  const int zero_point = midrise ? (1 << bits) - 1 : 1 << (bits - 1);
  const Vec::Bytes minus_zero = Vec::Set(u8, static_cast<uint8_t>(-zero_point));
  Vec::Ints sums[kTileVectors];
  for (size_t v = 0; v < kTileVectors; ++v) sums[v] = Vec::Zero(i32);
  for (size_t chunk = 0; chunk < chunks; ++chunk) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kTileVectors; ++v) {
      const size_t place = chunk * kChunk + v * Vec::kBytes;
      Vec::StoreU(Vec::Or(Vec::UnpackChunk<2>(at.pattern + 16 * chunk, v), starts), block.index + place);
      Vec::Bytes levels = Vec::UnpackChunk<bits>(at.codes + 8 * bits * chunk, v);
      if (midrise) levels = Vec::Add(levels, levels);
      levels = Vec::Add(levels, minus_zero);
      Vec::StoreU(levels, block.levels + place);
      sums[v] = Vec::SumOfMulQuadAccumulate(i32, ones, levels, sums[v]);
    }
  }
  const float offset = kWantsOffset ? 128.0f : 0.0f;
  for (size_t v = 0; v < kTileVectors; ++v) {
    Vec::StoreU(Vec::Mul(Vec::ConvertTo(f32, sums[v]), Vec::Set(f32, offset)), block.offsets + v * Vec::kLanes);
  }
}

// y [rows][kTileRows] += the products of `rows` rows of A with an unpacked block. scales: of the tile's rows.
template <int bits, size_t keep, size_t rows>
void unpacked_kernel(const Task& task, size_t i, size_t block, const UnpackedBlock& unpacked, const float* scales,
                     float* y) {
  const Layout& layout = *task.weight->layout;
  const size_t steps = layout.block_size / kStepColumns;
  const int8_t* a = task.block_codes(i, block);
  Vec::Ints totals[rows * kTileVectors];
  sum_in_runs<Vec, 1>(steps, Vec::Capacity(255, (1 << bits) - 1) / keep, totals, [&](size_t step, auto& sums) {
    Vec::Bytes tables[rows];
    for (size_t r = 0; r < rows; ++r) tables[r] = Vec::LoadDup128(u8, a + (r * steps + step) * kStepColumns);
#pragma GCC unroll 2
    for (size_t slot = 0; slot < keep; ++slot) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kTileVectors; ++v) {
        const size_t place = (step * keep + slot) * kChunk + v * Vec::kBytes;
        const Vec::Bytes index = Vec::LoadU(u8, unpacked.index + place);
        const Vec::Bytes levels = Vec::LoadU(u8, unpacked.levels + place);
        for (size_t r = 0; r < rows; ++r) {
          Vec::Accumulate(sums[r * kTileVectors + v], Vec::TableLookupBytes(tables[r], index), levels);
        }
      }
    }
  });
  for (size_t v = 0; v < kTileVectors; ++v) {
    const Vec::Floats scale = Vec::LoadU(f32, scales + v * Vec::kLanes);
    const Vec::Floats offset = Vec::LoadU(f32, unpacked.offsets + v * Vec::kLanes);
    for (size_t r = 0; r < rows; ++r) {
      const Vec::Floats a_scale = Vec::Set(f32, task.scales[(i + r) * task.block_stride + block]);
      const Vec::Floats level_sum = Vec::Sub(Vec::ConvertTo(f32, totals[r * kTileVectors + v]), offset);
      float* out = y + r * kTileRows + v * Vec::kLanes;
      Vec::StoreU(Vec::MulAdd(Vec::Mul(level_sum, a_scale), scale, Vec::LoadU(f32, out)), out);
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

size_t unpacked_bytes(const Layout& layout) { return layout.block_size / kStepColumns * layout.keep * kChunk; }

// Working memory: indices and levels of an unpacked block, and the outputs of a tile, [m][kTileRows].
size_t n_of_4_many_rows_scratch_bytes(const Task& task) {
  return 2 * unpacked_bytes(*task.weight->layout) + task.m * kTileRows * sizeof(float);
}

void n_of_4_many_rows_tile(const Task& task, const Range& range, void* scratch) {
  const Layout& layout = *task.weight->layout;
  UnpackedBlock unpacked;
  unpacked.index = static_cast<uint8_t*>(scratch);
  unpacked.levels = unpacked.index + unpacked_bytes(layout);
  float* y = reinterpret_cast<float*>(unpacked.levels + unpacked_bytes(layout));
  for_each_stored_tile(task, range, y, [&](size_t tile) {
    std::memset(y, 0, task.m * kTileRows * sizeof(float));
    for (size_t s = 0; s < layout.segments.size(); ++s) {
      const auto add = [&](auto width, TileStreams at, const uint16_t* scales, size_t begin, size_t end, float) {
        constexpr int bits = decltype(width)::kValue;
        const auto many_rows = layout.keep == 1 ? tile_many_rows<bits, 1> : tile_many_rows<bits, 2>;
        many_rows(task, at, scales, begin, end, unpacked, y);
      };
      with_tile(*task.weight, s, tile, add);
    }
  });
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
