// Multiplies one row of rounded activations with a dense weight of 2, 3 and 4 bits with short rows, B = S.T: four
// stored rows at a time in vectors of half the size (chunk_halves.h), fields of bytes where they are.
#pragma once

#include "decode/fields.h"
#include "integer/chunk_halves.h"
#include "integer/dense_few_rows.h"
#include "integer/row_scales.h"
#include "task/outputs.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kQuadRows = 4;

// Products of kBytes bytes of a dense row, which are kColumns codes, with as many activations. V: Vec::Half, if
// kUseHalves.
template <typename V, int bits>
struct RowProducts {
  using Bytes = typename V::Bytes;
  using Ints = typename V::Ints;
  static constexpr bool kUsed = bits < 8;
  static constexpr size_t kColumns = bits == 3 ? kChunk : Fields<V, bits>::kColumns, kBytes = kColumns / 8 * bits;
  static constexpr size_t kVectors = kColumns / V::kBytes;  // of activations
  static constexpr int kUnit = bits == 3 ? 2 : bits;        // sums in `upper` are 2 ** kUnit times as large

  // In the order of the fields, whose vectors have two ranges of 16 columns.
  static void load(const int8_t* a, Bytes (&activations)[kVectors]) {
    constexpr size_t kRange = V::kBytes / 2;
    for (size_t f = 0; f < kVectors; ++f) {
      if constexpr (bits == 4) {
        activations[f] = V::LoadU(u8, a + V::kBytes * f);
      } else {
        activations[f] = V::LoadCombine128(u8, a + kRange * f, bits == 2 ? kChunk : kChunk / 2);
      }
    }
  }

  static void add(const uint8_t* bytes, const Bytes (&a)[kVectors], Ints& lower, Ints& upper) {
    if constexpr (bits == 3) {
      Bytes levels[kHalves];
      HalfLevels<V, 3>::read(bytes, levels);
      lower = V::SumOfMulQuadAccumulate(i32, levels[0], a[0], lower);
      upper = V::SumOfMulQuadAccumulate(i32, levels[1], a[1], upper);
      return;
    }
    const Bytes all = V::LoadU(u8, bytes);
    const Bytes first = V::Set(u8, (1 << bits) - 1), second = V::Set(u8, ((1 << bits) - 1) << bits);
    lower = V::SumOfMulQuadAccumulate(i32, V::And(all, first), a[0], lower);
    upper = V::SumOfMulQuadAccumulate(i32, V::And(all, second), a[1], upper);
    if constexpr (bits == 2) {
      const Bytes rest = V::template ShiftRight16<4>(all);
      lower = V::SumOfMulQuadAccumulate(i32, V::And(rest, first), a[2], lower);
      upper = V::SumOfMulQuadAccumulate(i32, V::And(rest, second), a[3], upper);
    }
  }
};

bool dense_one_row_supported(const Layout& layout, size_t m) {
  if (!kUseHalves || m != 1 || !dense_few_rows_supported(layout, m)) return false;
  for (const Segment& segment : layout.segments) {
    bool fit = segment.row_bytes() <= kShortRow;
    with_bits(segment.bits, [&](auto width) {
      using Products = RowProducts<Vec::Half, decltype(width)::kValue>;
      fit = fit && Products::kUsed && layout.block_size % Products::kColumns == 0;
    });
    if (!fit) return false;
  }
  return true;
}

size_t dense_one_row_scratch_bytes(const Task& task) { return (1 + kQuadRows) * task.block_stride * sizeof(float); }

// acc += the products of a segment's blocks. a, b, products: at its first block. b_step: from a row to the next. ahead:
// bytes that are read soon, in the order of memory. kSteps: of a block, if known at compile time, else 0.
template <typename V, int bits, size_t kSteps>
inline __attribute__((always_inline)) void quad_dot(const int8_t* a, const uint8_t* b, size_t b_step,
                                                    const uint8_t* ahead, const float* products, size_t stride,
                                                    size_t blocks, size_t block_size,
                                                    typename V::Floats (&acc)[kQuadRows]) {
  using Products = RowProducts<V, bits>;
  const size_t steps = kSteps ? kSteps : block_size / Products::kColumns;
  for (size_t block = 0; block < blocks; ++block) {
    prefetch_lines(ahead, kQuadRows * steps * Products::kBytes, 0);
    ahead += kQuadRows * steps * Products::kBytes;
    typename V::Ints lower[kQuadRows], upper[kQuadRows];
    for (size_t j = 0; j < kQuadRows; ++j) lower[j] = upper[j] = V::Zero(i32);
    for (size_t step = 0; step < steps; ++step, a += Products::kColumns, b += Products::kBytes) {
      typename V::Bytes activations[Products::kVectors];
      Products::load(a, activations);
#pragma GCC unroll 4
      for (size_t j = 0; j < kQuadRows; ++j) Products::add(b + j * b_step, activations, lower[j], upper[j]);
    }
#pragma GCC unroll 4
    for (size_t j = 0; j < kQuadRows; ++j) {
      const typename V::Ints total = V::Add(lower[j], V::template ShiftRight<Products::kUnit>(upper[j]));
      acc[j] = V::MulAdd(V::ConvertTo(f32, total), V::Set(f32, products[j * stride + block]), acc[j]);
    }
  }
}

template <typename V>
void dense_one_row_outputs(const Task& task, const Range& range, void* scratch) {
  using Quad = VecBase<16>;  // an output of each row
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  float* offsets = static_cast<float*>(scratch);
  float* products = offsets + task.block_stride;
  write_offsets(task, offsets);
  for (size_t row = range.first, count; row < range.last; row += count) {
    count = range.last - row >= kQuadRows ? kQuadRows : 1;
    const size_t row_step = count == kQuadRows ? 1 : 0;  // a single row is computed as often
    typename V::Floats acc[kQuadRows];
    begin_rows<V, 1, kQuadRows>(task, 0, row, row_step, offsets, products, 0, acc);
    for_each_part(layout, row, row + 1, 0, layout.columns, [&](const Part& part) {
      const Segment& segment = layout.segments[part.segment];
      const size_t row_bytes = segment.row_bytes(), block = part.begin / layout.block_size;
      const size_t blocks = (part.end - part.begin) / layout.block_size;
      const uint8_t* b = w.codes + w.index->starts[part.segment].codes + (row - segment.row_begin) * row_bytes;
      const uint8_t* ahead = b + larger(4096, kQuadRows * row_bytes);
      with_bits(segment.bits, [&](auto width) {
        constexpr int bits = decltype(width)::kValue;
        if constexpr (RowProducts<V, bits>::kUsed) {
          const auto dot = [&](auto steps) {
            quad_dot<V, bits, decltype(steps)::kValue>(task.codes + part.begin, b, row_step * row_bytes, ahead,
                                                        products + block, task.block_stride, blocks,
                                                        layout.block_size, acc);
          };
          if (layout.block_size == 2 * kChunk) {
            dot(Constant<2 * kChunk / RowProducts<V, bits>::kColumns>{});
          } else {
            dot(Constant<size_t{0}>{});
          }
        }
      });
    });
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
