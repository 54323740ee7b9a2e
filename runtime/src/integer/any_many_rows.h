// Multiplies many rows of rounded activations with any layout, B = S.T: they share a block of weights that has been
// decoded to bytes and turned so that lanes are outputs.
#pragma once

#include "decode/decode.h"
#include "simd/turn.h"
#include "simd/vec.h"
#include "task/outputs.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kTurnedRows = Vec::kRegisters == 32 ? 8 : 4;  // of activations at a time

bool any_many_rows_supported(const Layout& layout, size_t m) {
  return m > kFewRows && layout.trans_b && bytes_fit(layout) && !layout.needs_mask() &&
         layout.block_size % Vec::kBytes == 0;
}

// A block of `outputs` rows from `row` on, from `column` on, turned. bytes: room for it, decoded.
template <int bits>
void turn_block(const Weight& w, const Part& part, size_t row, size_t outputs, size_t column, uint8_t* bytes,
                uint8_t* turned) {
  const Layout& layout = *w.layout;
  const size_t size = layout.block_size;
  if (layout.sparse() || size % kChunk) {
    if (outputs < kTurnedOutputs) std::memset(bytes, 0, size * kTurnedOutputs);
    decode(w, {part.segment, row, row + outputs, column, column + size}, bytes, size, nullptr);
    return turn(bytes, size, turned);
  }
  const Segment& segment = layout.segments[part.segment];
  const size_t row_bytes = segment.row_bytes();
  const uint8_t* codes = w.codes + w.index->starts[part.segment].codes + (row - segment.row_begin) * row_bytes +
                         (column - segment.column_begin) / kChunk * (8 * bits);
  alignas(64) uint8_t chunk[kTurnedOutputs * kChunk];
  if (outputs < kTurnedOutputs) std::memset(chunk, 0, sizeof chunk);
  for (size_t at = 0; at < size; at += kChunk, codes += 8 * bits, turned += kChunk * kTurnedOutputs) {
    for (size_t o = 0; o < outputs; ++o) unpack_chunk<bits>(codes + o * row_bytes, chunk + o * kChunk);
    turn(chunk, kChunk, turned);
  }
}

// y [rows][kTurnedOutputs] += the products of `rows` rows of A with a turned block. A byte u, at most `largest`, means
// (u - bias) times the output's scale.
template <int largest, size_t rows>
inline __attribute__((always_inline)) void turned_kernel(const Task& task, size_t i, size_t block,
                                                         const uint8_t* turned, const Vec::Floats (&scales)[2],
                                                         float bias, float* y) {
  const Layout& layout = *task.weight->layout;
  const int8_t* a = task.block_codes(i, block);
  Vec::Ints totals[rows * 2];
  sum_in_runs<Vec, 1>(layout.block_size / 4, Vec::Capacity(largest, 127), totals, [&](size_t quad, auto& sums) {
    const Vec::Bytes left = Vec::LoadU(u8, turned + quad * (2 * Vec::kBytes));
    const Vec::Bytes right = Vec::LoadU(u8, turned + quad * (2 * Vec::kBytes) + Vec::kBytes);
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r) {
      const Vec::Bytes x = Vec::LoadDup32(u8, a + r * layout.block_size + 4 * quad);
      Vec::Accumulate(sums[2 * r], left, x);
      Vec::Accumulate(sums[2 * r + 1], right, x);
    }
  });
  for (size_t r = 0; r < rows; ++r) {
    const size_t place = (i + r) * task.block_stride + block;
    const Vec::Floats a_scale = Vec::Set(f32, task.scales[place]), offset = Vec::Set(f32, -bias * task.sums[place]);
    for (size_t h = 0; h < 2; ++h) {
      float* out = y + r * kTurnedOutputs + h * Vec::kLanes;
      // (total · scale of A - bias · sum of A) · scale of B
      const Vec::Floats product = Vec::MulAdd(Vec::ConvertTo(f32, totals[2 * r + h]), a_scale, offset);
      Vec::StoreU(Vec::MulAdd(product, scales[h], Vec::LoadU(f32, out)), out);
    }
  }
}

template <int largest>
void turned_rows(const Task& task, size_t block, const uint8_t* turned, const Vec::Floats (&scales)[2], float bias,
                 float* y) {
  size_t i = 0;
  for (; i + kTurnedRows <= task.m; i += kTurnedRows) {
    turned_kernel<largest, kTurnedRows>(task, i, block, turned, scales, bias, y + i * kTurnedOutputs);
  }
  for (; i < task.m; ++i) turned_kernel<largest, 1>(task, i, block, turned, scales, bias, y + i * kTurnedOutputs);
}

// Room for a decoded block, the same turned, and the outputs [m][kTurnedOutputs].
size_t any_many_rows_scratch_bytes(const Task& task) {
  return 2 * task.weight->layout->block_size * kTurnedOutputs + task.m * kTurnedOutputs * sizeof(float);
}

void any_many_rows_tile(const Task& task, const Range& range, void* scratch) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t size = layout.block_size;
  uint8_t* bytes = static_cast<uint8_t*>(scratch);
  uint8_t* turned = bytes + size * kTurnedOutputs;
  float* y = reinterpret_cast<float*>(turned + size * kTurnedOutputs);
  for (size_t j = range.first; j < range.last; j += kTurnedOutputs) {
    const size_t outputs = smaller(kTurnedOutputs, range.last - j);
    std::memset(y, 0, task.m * kTurnedOutputs * sizeof(float));
    for_each_part(layout, j, j + outputs, 0, layout.columns, [&](const Part& part) {
      const Segment& segment = layout.segments[part.segment];
      const Encoding& e = segment.encoding;
      for (size_t column = part.begin; column < part.end; column += size) {
        const size_t block = column / size;
        float scales[kTurnedOutputs] = {};
        const size_t scale = block * scale_step(layout);
        for (size_t o = 0; o < outputs; ++o) {
          scales[o] = e.unit * float_from_half(first_scale(w, part.segment, j + o)[scale]);
        }
        const Vec::Floats vectors[2] = {Vec::LoadU(f32, scales), Vec::LoadU(f32, scales + Vec::kLanes)};
        with_bits(segment.bits, [&](auto width) {
          constexpr int bits = decltype(width)::kValue;
          if constexpr (bits < 8 || Vec::kEightBits) {
            turn_block<bits>(w, part, j, outputs, column, bytes, turned);
            constexpr int kDoubled = bits < 8 ? (2 << bits) - 1 : 255;  // eight bits are never doubled
            if (e.shift) {
              turned_rows<kDoubled>(task, block, turned, vectors, e.bias, y);
            } else {
              turned_rows<(1 << bits) - 1>(task, block, turned, vectors, e.bias, y);
            }
          }
        });
      }
    });
    write_outputs(task, j, outputs, y, kTurnedOutputs);
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
