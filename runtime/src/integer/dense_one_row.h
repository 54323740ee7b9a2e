// Multiplies one row of rounded activations with a dense weight of 2, 3 and 4 bits with short rows, B = S.T: four
// stored rows at a time in vectors of half the size. On CPUs with AVX-512, which load 16 bytes twice into 32 at no cost,
// where into 64 they take the time of an addition.
#pragma once

#include "integer/chunk_halves.h"
#include "integer/dense_few_rows.h"
#include "integer/row_scales.h"
#include "task/outputs.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kQuadRows = 4;

// The codes of a chunk in two vectors of V: Vec::Half, if kUseHalves. Both halves of a vector hold the same stored
// bytes, but not the same fields of them. Fields may stay where they are: those in the upper half are kUpperUnit times
// as large, until the end of a row; those of the second vector 2 ** kSecondShift times, until the end of a block.
template <typename V, int bits>
struct ChunkLevels {
  using Bytes = typename V::Bytes;
  static constexpr float kUpperUnit = bits == 4 ? 16 : bits == 2 ? 4 : 1;
  static constexpr int kSecondShift = bits == 3 ? 4 : 0;

  static void read(const uint8_t* chunk, Bytes (&levels)[2]) {
    if constexpr (bits == 4) {
      for (size_t v = 0; v < 2; ++v) {
        levels[v] = V::And(V::LoadDup128(u8, chunk + 16 * v), V::SetHalves(u8, 0x0f, 0xf0));
      }
    } else if constexpr (bits == 2) {
      const Bytes low = V::LoadDup128(u8, chunk), fields = V::SetHalves(u8, 0x03, 0x0c);
      levels[0] = V::And(low, fields);
      levels[1] = V::And(V::template ShiftRight16<4>(low), fields);
    } else {
      // Each byte gets two levels: fields 0 and 2 of the lower plane, or 1 and 3, below bits q and 4 + q of the higher
      // plane, in lane q of 8 bytes.
      uint64_t plane;
      std::memcpy(&plane, chunk + 16, 8);
      const Bytes low = V::template ShiftRight64<0, 0, 2, 2>(V::LoadDup128(u8, chunk));
      const Bytes high = V::template RotateLeft64<2, 1, 0, 63>(V::Set64(u8, plane));
      const Bytes pairs = V::IfVecThenElse(V::Set(u8, 0x33), low, high);
      levels[0] = V::And(pairs, V::Set(u8, 0x07));
      levels[1] = V::And(pairs, V::Set(u8, 0x70));
    }
  }

  // The activations of a chunk in the same order.
  static void load(const int8_t* a, Bytes (&activations)[2]) {
    for (size_t v = 0; v < 2; ++v) {
      activations[v] = bits == 4 ? V::LoadCombine128(u8, a + 16 * v, 32) : V::LoadU(u8, a + 32 * v);
    }
  }
};

bool dense_one_row_supported(const Layout& layout, size_t m) {
  if (!kUseHalves || m != 1 || !dense_few_rows_supported(layout, m)) return false;
  for (const Segment& segment : layout.segments) {
    if (segment.bits == 8 || segment.row_bytes() > kShortRow) return false;
  }
  return true;
}

size_t dense_one_row_scratch_bytes(const Task& task) { return (1 + kQuadRows) * task.block_stride * sizeof(float); }

// acc += the products of a segment's blocks. a, b, products: at its first block. b_step: from a row to the next. ahead:
// bytes that are read soon, in the order of memory. kChunks: of a block, if known at compile time, else 0.
template <typename V, int bits, size_t kChunks>
inline __attribute__((always_inline)) void quad_dot(const int8_t* a, const uint8_t* b, size_t b_step,
                                                    const uint8_t* ahead, const float* products, size_t stride,
                                                    size_t blocks, size_t block_size,
                                                    typename V::Floats (&acc)[kQuadRows]) {
  using Levels = ChunkLevels<V, bits>;
  const size_t chunks = kChunks ? kChunks : block_size / kChunk;
  typename V::Floats sums[kQuadRows];
  for (auto& sum : sums) sum = V::Zero(f32);
  for (size_t block = 0; block < blocks; ++block) {
    prefetch_lines(ahead, kQuadRows * chunks * (8 * bits), 0);
    ahead += kQuadRows * chunks * (8 * bits);
    typename V::Ints totals[kQuadRows], seconds[kQuadRows];  // by the vectors of a chunk
    for (size_t j = 0; j < kQuadRows; ++j) totals[j] = seconds[j] = V::Zero(i32);
    for (size_t chunk = 0; chunk < chunks; ++chunk, a += kChunk, b += 8 * bits) {
      typename V::Bytes activations[2];
      Levels::load(a, activations);
#pragma GCC unroll 4
      for (size_t j = 0; j < kQuadRows; ++j) {
        typename V::Bytes levels[2];
        Levels::read(b + j * b_step, levels);
        auto& second = Levels::kSecondShift ? seconds[j] : totals[j];
        second = V::SumOfMulQuadAccumulate(i32, levels[1], activations[1], second);
        if (Levels::kSecondShift && kChunks == 1) totals[j] = V::template ShiftRight<Levels::kSecondShift>(second);
        totals[j] = V::SumOfMulQuadAccumulate(i32, levels[0], activations[0], totals[j]);
      }
    }
#pragma GCC unroll 4
    for (size_t j = 0; j < kQuadRows; ++j) {
      if (Levels::kSecondShift && kChunks != 1) {
        totals[j] = V::Add(totals[j], V::template ShiftRight<Levels::kSecondShift>(seconds[j]));
      }
      sums[j] = V::MulAdd(V::ConvertTo(f32, totals[j]), V::Set(f32, products[j * stride + block]), sums[j]);
    }
  }
  const typename V::Floats units = V::SetHalves(f32, 1.0f, 1.0f / Levels::kUpperUnit);
  for (size_t j = 0; j < kQuadRows; ++j) acc[j] = V::MulAdd(sums[j], units, acc[j]);
}

template <typename V>
void dense_one_row_outputs(const Task& task, const Range& range, void* scratch) {
  using Quad = VecBase<16>;  // an output of each row
  const Layout& layout = *task.weight->layout;
  const size_t stride = task.block_stride, block_size = layout.block_size;
  float* offsets = static_cast<float*>(scratch);
  float* products = offsets + stride;
  SegmentRows segments[4];
  const size_t segment_count = segment_rows(*task.weight, segments);
  write_offsets(task, offsets);
  for (size_t row = range.first, count; row < range.last; row += count) {
    count = range.last - row >= kQuadRows ? kQuadRows : 1;
    const size_t row_step = count == kQuadRows ? 1 : 0;  // a single row is computed as often
    typename V::Floats acc[kQuadRows];
    begin_rows<V, 1, kQuadRows>(task, 0, row, row_step, offsets, products, 0, acc);
    for (size_t s = 0; s < segment_count; ++s) {
      const SegmentRows& segment = segments[s];
      const uint8_t* b = segment.codes + row * segment.row_bytes;
      const uint8_t* ahead = b + larger(4096, kQuadRows * segment.row_bytes);
      const int8_t* a = task.codes + segment.block_begin * block_size;
      with_bits(segment.bits, [&](auto width) {
        constexpr int bits = decltype(width)::kValue;
        if constexpr (bits < 8) {
          const auto dot = [&](auto chunks) {
            quad_dot<V, bits, decltype(chunks)::kValue>(a, b, row_step * segment.row_bytes, ahead,
                                                        products + segment.block_begin, stride,
                                                        segment.block_end - segment.block_begin, block_size, acc);
          };
          if (block_size == kChunk) {
            dot(Constant<size_t{1}>{});
          } else if (block_size == 2 * kChunk) {
            dot(Constant<size_t{2}>{});
          } else {
            dot(Constant<size_t{0}>{});
          }
        }
      });
    }
    Quad::Floats sums = V::ReduceSum4(f32, acc);
    if (count == 1) {
      *task.output(0, row) = sums[0] + bias_of(task, row);
      continue;
    }
    if (task.bias) sums = Quad::Add(sums, Quad::LoadU(f32, task.bias + row));
    Quad::StoreU(sums, task.output(0, row));
  }
}

// V: Vec. Never called where there are no halves.
template <typename V>
void dense_one_row_tile(const Task& task, const Range& range, void* scratch) {
  if constexpr (kUseHalves) dense_one_row_outputs<typename V::Half>(task, range, scratch);
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
