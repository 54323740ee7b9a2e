// Multiplies one row of rounded activations with a bitmap weight, B = S.T: codes go to their places in a register and
// are multiplied there. For CPUs with an instruction that does that; on others whole rows are decoded
// (any_decoded_rows.h).
#pragma once

#include "decode/decode.h"
#include "integer/row_scales.h"
#include "simd/vec.h"
#include "task/outputs.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

bool bitmap_one_row_supported(const Layout& layout, size_t m) {
  return Vec::kExpands && m == 1 && layout.trans_b && layout.bitmap() && !layout.needs_mask() &&
         layout.block_size % kChunk == 0;
}

// Rows whose codes become bytes together: the next ones need not wait for these then.
size_t bitmap_rows(const Layout& layout) { return larger(1, kBitmapEntries / layout.columns); }

// Working memory: the sums of each row; of every block offsets (row_scales.h), and scales of A times those of each row;
// codes as bytes.
size_t bitmap_one_row_scratch_bytes(const Task& task) {
  const Layout& layout = *task.weight->layout;
  const size_t rows = bitmap_rows(layout);
  return (1 + rows) * task.block_stride * sizeof(float) + rows * (sizeof(Vec::Floats) + layout.columns) + kChunk;
}

// acc += the products of the activations with one row of a part of blocks. bytes: its next codes; pattern: of the row's
// part. Returns the codes after those.
template <typename V>
inline const uint8_t* bitmap_dot(const Task& task, const Part& part, uint64_t absent, const uint8_t* bytes,
                                 const uint8_t* pattern, const float* products, typename V::Floats& acc) {
  const size_t block_size = task.weight->layout->block_size;
  const int8_t* a = task.codes + part.begin;
  const typename V::Bytes others = V::Set(u8, static_cast<uint8_t>(absent));
  typename V::Floats sum = acc;
  for (size_t block = part.begin / block_size; block < part.end / block_size; ++block) {
    typename V::Ints total = V::Zero(i32);
    for (size_t i = 0; i < block_size; i += kChunk, a += kChunk, pattern += kChunk / 8) {
      total = V::SumOfMulQuadAccumulate(i32, expand_chunk<V>(bytes, pattern, others), V::LoadU(u8, a), total);
    }
    sum = V::MulAdd(V::ConvertTo(f32, total), V::Set(f32, products[block]), sum);
  }
  acc = sum;
  return bytes;
}

// V: Vec, if it has kExpands.
template <typename V>
void bitmap_one_row_outputs(const Task& task, const Range& range, void* scratch) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t stride = task.block_stride, at_once = bitmap_rows(layout);
  auto* acc = static_cast<typename V::Floats*>(scratch);  // [at_once]
  float* offsets = reinterpret_cast<float*>(acc + at_once);
  float* products = offsets + stride;  // [at_once][stride]
  uint8_t* bytes = reinterpret_cast<uint8_t*>(products + at_once * stride);
  const float unit = layout.segments.front().encoding.unit;  // of all
  write_offsets(task, offsets);
  for (size_t first = range.first, last; first < range.last; first = last) {
    last = smaller(first + at_once, range.last);
    for (size_t row = first; row < last; ++row) {
      typename V::Floats sums[1];
      begin_rows<V, 1, 1>(task, 0, row, 0, offsets, products + (row - first) * stride, 0, sums);
      acc[row - first] = sums[0];
    }
    for_each_part(layout, first, last, 0, layout.columns, [&](const Part& part) {
      const Segment& segment = layout.segments[part.segment];
      const StreamIndex::SegmentStart& start = w.index->starts[part.segment];
      const size_t row_bytes = segment.columns() / 8, in_segment = part.row_begin - segment.row_begin;
      const uint8_t* pattern = w.pattern + start.pattern + in_segment * row_bytes;
      const size_t pattern_bytes = (part.row_end - part.row_begin) * row_bytes;
      prefetch_lines(pattern, pattern_bytes, larger(2048, pattern_bytes));
      with_bits(segment.bits, [&](auto width) {
        constexpr int bits = decltype(width)::kValue;
        bytes_of_codes<V, bits>(w.codes + start.codes, w.codes + w.codes_size, start.codes_before[in_segment] * bits,
                             count_bits(pattern, pattern_bytes), segment.encoding, bytes);
      });
      const uint8_t* next = bytes;
      for (size_t row = first; row < last; ++row, pattern += row_bytes) {
        next = bitmap_dot<V>(task, part, segment.encoding.absent, next, pattern, products + (row - first) * stride,
                          acc[row - first]);
      }
    });
    for (size_t row = first; row < last; ++row) {
      *task.output(0, row) = unit * V::ReduceSum(f32, acc[row - first]) + bias_of(task, row);
    }
  }
}

// V: Vec. Never called where it lacks kExpands.
template <typename V>
void bitmap_one_row_tile(const Task& task, const Range& range, void* scratch) {
  if constexpr (V::kExpands) bitmap_one_row_outputs<V>(task, range, scratch);
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
