// Few rows of rounded activations times the 16 rows of a tile of an n:m weight with groups of 4, read from the packed
// chunks.
#pragma once

#include "decode/decode.h"
#include "integer/chunk_halves.h"
#include "simd/vec.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kParts = kChunk / Vec::kBytes;  // vectors of a chunk; also of floats for the 16 rows of a tile
constexpr size_t kStepColumns = 4 * kStepGroups;
static_assert(kParts * Vec::kLanes == kTileRows, "lanes of a chunk's sums are the rows of a tile");

// What to add to the indices of a vector: where the group of every byte starts among the 16 activations.
template <typename V>
inline typename V::Bytes group_starts() {
  const uint8_t starts[4] = {0, 4, 8, 12};
  return V::repeat4(starts);
}

// The codes and pattern of a tile, at a segment's first block.
struct TileStreams {
  const uint8_t* codes;
  const uint8_t* pattern;
};

// acc += the products of `rows` rows of A with the 16 rows of a tile, over the blocks of one segment. scales: of the
// tile. kSteps: of a block, if known at compile time, else 0.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)

// In vectors of 32 bytes (chunk_halves.h): vector 0 has the sums of rows 0 to 3 and 8 to 11, vector 1 those of the others.
template <int bits, size_t keep, size_t rows, size_t kSteps>
void tile_dot_steps(const Task& task, size_t i, TileStreams at, const uint16_t* scales, size_t block_begin,
                    size_t block_end, float bias, Vec::Floats (&acc)[rows][kParts]) {
  const Layout& layout = *task.weight->layout;
  const size_t steps = kSteps ? kSteps : layout.block_size / kStepColumns;
  const __m256i starts = group_starts<Vec32>(), place_bits = Vec32::fill(3);
  const __m256i shifts[kHalves] = {_mm256_setr_epi64x(0, 0, 4, 4), _mm256_setr_epi64x(2, 2, 6, 6)};
  const __m256i units[kHalves] = {Vec32::fill(1), Vec32::fill(HalfLevels<bits>::kUnit)};
  __m256 sums[rows][kHalves];
  for (size_t r = 0; r < rows; ++r) sums[r][0] = sums[r][1] = Vec32::zero();
  for (size_t block = block_begin; block < block_end; ++block) {
    const int8_t* a = task.block_codes(i, block);
    // Sums of level times activation, and of the activations that were picked.
    __m256i level_sums[rows][kHalves], picked_sums[rows][kHalves];
    for (size_t r = 0; r < rows; ++r) {
      for (size_t v = 0; v < kHalves; ++v) level_sums[r][v] = picked_sums[r][v] = Vec32::zero_ints();
    }
#pragma GCC unroll 4
    for (size_t step = 0; step < steps; ++step) {
#pragma GCC unroll 2
      for (size_t slot = 0; slot < keep; ++slot, at.codes += 8 * bits, at.pattern += 16) {
        __m256i levels[kHalves];
        HalfLevels<bits>::read(at.codes, levels);
        for (size_t v = 0; v < kHalves; ++v) {
          const __m256i places = _mm256_srlv_epi64(twice(at.pattern), shifts[v]);
          const __m256i index = Vec32::and_or(places, place_bits, starts);
          for (size_t r = 0; r < rows; ++r) {
            const __m256i picked = Vec32::select(Vec32::repeat16(a + (r * steps + step) * kStepColumns), index);
            level_sums[r][v] = _mm256_dpbusd_epi32(level_sums[r][v], levels[v], picked);
            picked_sums[r][v] = _mm256_dpbusd_epi32(picked_sums[r][v], units[v], picked);
          }
        }
      }
    }
    prefetch_lines(at.codes, steps * keep * 8 * bits);
    prefetch_lines(at.pattern, steps * keep * 16);
    const __m256i halves = _mm256_permute4x64_epi64(Vec32::load(scales + block * kTileRows), 0xd8);
    const __m256 scale[kHalves] = {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                                   _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
    for (size_t r = 0; r < rows; ++r) {
      const __m256 a_scale = Vec32::set(task.scales[(i + r) * task.block_stride + block]);
      for (size_t v = 0; v < kHalves; ++v) {
        const __m256 level_sum = Vec32::multiply_add(Vec32::floats(picked_sums[r][v]), Vec32::set(-bias),
                                                     Vec32::floats(level_sums[r][v]));
        sums[r][v] = Vec32::multiply_add(level_sum, Vec32::multiply(scale[v], a_scale), sums[r][v]);
      }
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    const __m256 other = Vec32::multiply(sums[r][1], Vec32::set(1.0f / HalfLevels<bits>::kUnit));
    const __m512 both = _mm512_insertf32x8(_mm512_castps256_ps512(sums[r][0]), other, 1);
    acc[r][0] = _mm512_add_ps(acc[r][0], _mm512_shuffle_f32x4(both, both, 0xd8));
  }
}

#else

template <int bits, size_t keep, size_t rows, size_t kSteps>
void tile_dot_steps(const Task& task, size_t i, TileStreams at, const uint16_t* scales, size_t block_begin,
                    size_t block_end, float bias, Vec::Floats (&acc)[rows][kParts]) {
  const Layout& layout = *task.weight->layout;
  const size_t steps = kSteps ? kSteps : layout.block_size / kStepColumns;
  const Vec::Bytes starts = group_starts<Vec>(), ones = Vec::fill(1), place_bits = Vec::fill(3);
  for (size_t block = block_begin; block < block_end; ++block) {
    const int8_t* a = task.block_codes(i, block);
    // Sums of level times activation, then of the activations that were picked.
    constexpr size_t kSums = rows * kParts;
    Vec::Ints totals[2 * kSums];
    constexpr size_t kChains = rows == 1 ? 2 : 1, kStepsPerRun = Vec::adds((1 << bits) - 1, 127) / keep;
    sum_in_runs<Vec, kChains>(steps, kStepsPerRun, totals, [&](size_t step, auto& sums) {
      Vec::Bytes tables[rows];
      for (size_t r = 0; r < rows; ++r) tables[r] = Vec::repeat16(a + (r * steps + step) * kStepColumns);
#pragma GCC unroll 2
      for (size_t slot = 0; slot < keep; ++slot, at.codes += 8 * bits, at.pattern += 16) {
#pragma GCC unroll 4
        for (size_t v = 0; v < kParts; ++v) {
          const Vec::Bytes index = Vec::and_or(Vec::pairs(at.pattern, v), place_bits, starts);
          const Vec::Bytes levels = Vec::chunk<bits>(at.codes, v);
          for (size_t r = 0; r < rows; ++r) {
            const Vec::Bytes picked = Vec::select(tables[r], index);
            Vec::add(sums[r * kParts + v], levels, picked);
            Vec::add(sums[kSums + r * kParts + v], ones, picked);
          }
        }
      }
    });
    prefetch_lines(at.codes, steps * keep * 8 * bits);
    prefetch_lines(at.pattern, steps * keep * 16);
    for (size_t v = 0; v < kParts; ++v) {
      const Vec::Floats scale = Vec::halves(scales + block * kTileRows + v * Vec::kLanes);
      for (size_t r = 0; r < rows; ++r) {
        const size_t n = r * kParts + v;
        const Vec::Floats product = Vec::multiply(scale, Vec::set(task.scales[(i + r) * task.block_stride + block]));
        const Vec::Floats level_sum =
            Vec::multiply_add(Vec::floats(totals[kSums + n]), Vec::set(-bias), Vec::floats(totals[n]));
        acc[r][v] = Vec::multiply_add(level_sum, product, acc[r][v]);
      }
    }
  }
}

#endif

template <int bits, size_t keep, size_t rows>
void tile_dot(const Task& task, size_t i, TileStreams at, const uint16_t* scales, size_t block_begin, size_t block_end,
              float bias, Vec::Floats (&acc)[rows][kParts]) {
  (task.weight->layout->block_size == 8 * kStepColumns ? tile_dot_steps<bits, keep, rows, usual(8)>
                                                       : tile_dot_steps<bits, keep, rows, 0>)(
      task, i, at, scales, block_begin, block_end, bias, acc);
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
