// Does the work of n_of_4_few_rows.h in vectors of half the size (chunk_halves.h), which is faster on CPUs with
// AVX-512.
#pragma once

#include "integer/chunk_halves.h"
#include "integer/n_of_4.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// As tile_dot_vectors. Half 0 has the sums of rows 0 to 3 and 8 to 11, half 1 those of the others. V: Vec, if
// kUseHalves.
template <typename V, int bits, size_t keep, size_t rows, size_t kSteps>
void tile_dot_halves(const Task& task, size_t i, TileStreams at, const uint16_t* scales, size_t block_begin,
                    size_t block_end, float bias, typename V::Floats (&acc)[rows][kTileVectors]) {
  const Layout& layout = *task.weight->layout;
  const size_t steps = kSteps ? kSteps : layout.block_size / kStepColumns;
  using Half = typename V::Half;
  using Bytes = typename Half::Bytes;
  using Levels = HalfLevels<Half, bits>;
  const Bytes starts = group_starts<Half>(), place_bits = Half::Set(u8, 3);
  const Bytes units[kHalves] = {Half::Set(u8, 1), Half::Set(u8, Levels::kUnit)};
  typename Half::Floats sums[rows][kHalves];
  for (size_t r = 0; r < rows; ++r) sums[r][0] = sums[r][1] = Half::Zero(f32);
  for (size_t block = block_begin; block < block_end; ++block) {
    const int8_t* a = task.block_codes(i, block);
    // Sums of level times activation, and of the activations that were picked.
    typename Half::Ints level_sums[rows][kHalves], picked_sums[rows][kHalves];
    for (size_t r = 0; r < rows; ++r) {
      for (size_t v = 0; v < kHalves; ++v) level_sums[r][v] = picked_sums[r][v] = Half::Zero(i32);
    }
#pragma GCC unroll 4
    for (size_t step = 0; step < steps; ++step) {
#pragma GCC unroll 2
      for (size_t slot = 0; slot < keep; ++slot, at.codes += 8 * bits, at.pattern += 16) {
        Bytes levels[kHalves];
        Levels::read(at.codes, levels);
        for (size_t v = 0; v < kHalves; ++v) {
          const Bytes pairs = Half::LoadDup128(u8, at.pattern);
          const Bytes places = v ? Half::template ShiftRight64<2, 2, 6, 6>(pairs)
                                 : Half::template ShiftRight64<0, 0, 4, 4>(pairs);
          const Bytes index = Half::AndOr(places, place_bits, starts);
          for (size_t r = 0; r < rows; ++r) {
            const Bytes table = Half::LoadDup128(u8, a + (r * steps + step) * kStepColumns);
            const Bytes picked = Half::TableLookupBytes(table, index);
            level_sums[r][v] = Half::SumOfMulQuadAccumulate(i32, levels[v], picked, level_sums[r][v]);
            picked_sums[r][v] = Half::SumOfMulQuadAccumulate(i32, units[v], picked, picked_sums[r][v]);
          }
        }
      }
    }
    prefetch_lines(at.codes, steps * keep * 8 * bits);
    prefetch_lines(at.pattern, steps * keep * 16);
    typename Half::Halves stored[kHalves];
    V::LoadAlternate(f16, scales + block * kTileRows, stored[0], stored[1]);
    for (size_t r = 0; r < rows; ++r) {
      const typename Half::Floats a_scale = Half::Set(f32, task.scales[(i + r) * task.block_stride + block]);
      for (size_t v = 0; v < kHalves; ++v) {
        const typename Half::Floats level_sum = Half::MulAdd(
            Half::ConvertTo(f32, picked_sums[r][v]), Half::Set(f32, -bias), Half::ConvertTo(f32, level_sums[r][v]));
        sums[r][v] = Half::MulAdd(level_sum, Half::Mul(Half::PromoteTo(f32, stored[v]), a_scale), sums[r][v]);
      }
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    const typename Half::Floats other = Half::Mul(sums[r][1], Half::Set(f32, 1.0f / Levels::kUnit));
    acc[r][0] = V::Add(acc[r][0], V::CombineAlternate(sums[r][0], other));
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
