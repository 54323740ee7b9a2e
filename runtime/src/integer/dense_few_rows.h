// Multiplies few rows of rounded activations with a dense weight, B = S.T, of which the packed chunks are read
// directly.
#pragma once

#include "decode/decode.h"
#include "integer/row_scales.h"
#include "simd/vec.h"
#include "task/outputs.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kDenseOutputs = 4;  // at a time, at most
// Rows of up to so many bytes are read side by side, and the next ones are asked for in the order of memory, not of
// use: a core can have few requests under way, but what looks like one stream is fetched ahead. Longer rows are such a
// stream themselves, one after the other, which is worth it for one row of A.
constexpr size_t kShortRow = 1536;

bool dense_few_rows_supported(const Layout& layout, size_t m) {
  return m <= kFewRows && layout.trans_b && !layout.sparse() && bytes_fit(layout) && layout.block_size % kChunk == 0;
}

// What the rows of a tile have in one segment.
struct SegmentRows {
  int bits;
  const uint8_t* codes;  // of row 0
  size_t row_bytes;
  size_t block_begin, block_end;
};

// Those of a weight whose rows are not cut. Returns how many they are.
inline size_t segment_rows(const Weight& w, SegmentRows (&segments)[4]) {
  const Layout& layout = *w.layout;
  size_t count = 0;
  for_each_part(layout, 0, 1, 0, layout.columns, [&](const Part& part) {
    const Segment& segment = layout.segments[part.segment];
    SegmentRows& rows = segments[count++];
    rows.bits = segment.bits;
    rows.row_bytes = segment.row_bytes();
    rows.codes = w.codes + w.index->starts[part.segment].codes;
    rows.block_begin = part.begin / layout.block_size;
    rows.block_end = part.end / layout.block_size;
  });
  return count;
}

// What is asked for beside each block: as many bytes of the next rows, in the order of memory; or, of long rows, the
// same block of the next ones, if they fit in the first cache beside these.
class Ahead {
 public:
  Ahead(const uint8_t* b, size_t outputs, size_t row_bytes, size_t block_bytes) : block_bytes_(block_bytes) {
    const size_t all_rows = outputs * row_bytes;
    const bool in_order = row_bytes <= kShortRow;
    next_ = b + (in_order ? larger(4096, all_rows) : all_rows <= 20480 ? all_rows : 2048);
    row_step_ = in_order ? block_bytes : row_bytes;
    block_step_ = in_order ? outputs * block_bytes : block_bytes;
  }

  template <size_t outputs>
  inline void ask() {
    if (outputs == 1) return;
    for (size_t j = 0; j < outputs; ++j) prefetch_lines(next_ + j * row_step_, block_bytes_, 0);
    next_ += block_step_;
  }

 private:
  const uint8_t* next_;
  size_t block_bytes_, row_step_, block_step_;
};

// Adds to sums the products of `rows` rows of A with `outputs` stored rows, over the blocks of one segment. b: the
// first row, at the segment's first column; the others follow every b_stride bytes (few registers hold all their
// addresses then). products [rows][outputs][block_stride]: scales of A times those of B. kChunks: of a block, if known
// at compile time, else 0.
template <int bits, size_t rows, size_t outputs, size_t kChunks>
void dense_dot(const Task& task, size_t i, const SegmentRows& segment, const uint8_t* b, size_t b_stride,
               const float* products, Vec::Floats (&sums)[rows][outputs]) {
  const Layout& layout = *task.weight->layout;
  const size_t chunks = kChunks ? kChunks : layout.block_size / kChunk;
  const size_t stride = task.block_stride, block_bytes = chunks * (8 * bits), a_step = task.m * layout.block_size;
  Ahead ahead(b, outputs, segment.row_bytes, block_bytes);
  Vec::Floats acc[rows][outputs];  // in registers, as `sums` may not be
  for (size_t r = 0; r < rows; ++r) {
    for (size_t j = 0; j < outputs; ++j) acc[r][j] = sums[r][j];
  }
  const int8_t* a = task.block_codes(i, segment.block_begin);
  products += segment.block_begin;
  for (size_t block = segment.block_begin; block < segment.block_end; ++block) {
    Vec::Ints totals[rows * outputs];
    ahead.ask<outputs>();
    constexpr size_t kChunksPerRun = Vec::Capacity((1 << bits) - 1, 127) / kChunkVectors;
    sum_in_runs<Vec, 1>(chunks, kChunksPerRun, totals, [&](size_t chunk, auto& run) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kChunkVectors; ++v) {
        Vec::Bytes codes[rows];
        for (size_t r = 0; r < rows; ++r) {
          codes[r] = Vec::LoadU(u8, a + (r * chunks + chunk) * kChunk + v * Vec::kBytes);
        }
#pragma GCC unroll 4
        for (size_t j = 0; j < outputs; ++j) {
          const Vec::Bytes weights = Vec::UnpackChunk<bits>(b + j * b_stride + chunk * (8 * bits), v);
          for (size_t r = 0; r < rows; ++r) Vec::Accumulate(run[r * outputs + j], weights, codes[r]);
        }
      }
    });
    for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (size_t j = 0; j < outputs; ++j) {
        const size_t n = r * outputs + j;
        acc[r][j] = Vec::MulAdd(Vec::ConvertTo(f32, totals[n]), Vec::Set(f32, products[n * stride]), acc[r][j]);
      }
    }
    a += a_step;
    b += block_bytes;
    ++products;
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t j = 0; j < outputs; ++j) sums[r][j] = acc[r][j];
  }
}

// Outputs [first, first + count): `outputs` of them, or one, which is then computed as often. segments: what their rows
// have in each. offsets: of write_offsets. products: room for rows * outputs * block_stride.
template <size_t rows, size_t outputs>
void dense_outputs(const Task& task, size_t i, size_t first, size_t count, const SegmentRows* segments,
                   size_t segment_count, const float* offsets, float* products) {
  const Layout& layout = *task.weight->layout;
  const size_t stride = task.block_stride;
  Vec::Floats acc[rows][outputs];
  for (size_t j = 0; j < outputs; ++j) {
    Vec::Floats sums[rows];
    const size_t row = first + (count == outputs ? j : 0);
    begin_rows<Vec, rows, 1>(task, i, row, 0, offsets, products + j * stride, outputs * stride, sums);
    for (size_t r = 0; r < rows; ++r) acc[r][j] = sums[r];
  }
  for (size_t s = 0; s < segment_count; ++s) {
    const SegmentRows& segment = segments[s];
    const uint8_t* b = segment.codes + first * segment.row_bytes;
    const size_t b_stride = count == outputs ? segment.row_bytes : 0;
    with_bits(segment.bits, [&](auto width) {
      constexpr int bits = decltype(width)::kValue;
      if constexpr (bits < 8 || Vec::kEightBits) {
        const auto dot = layout.block_size == 2 * kChunk ? dense_dot<bits, rows, outputs, usual(2)>
                         : layout.block_size == kChunk   ? dense_dot<bits, rows, outputs, usual(1)>
                                                         : dense_dot<bits, rows, outputs, 0>;
        dot(task, i, segment, b, b_stride, products, acc);
      }
    });
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t j = 0; j < count; ++j) {
      *task.output(i + r, first + j) = Vec::ReduceSum(f32, acc[r][j]) + bias_of(task, first + j);
    }
  }
}

void dense_few_rows_tile(const Task& task, const Range& range, void* scratch) {
  float* offsets = static_cast<float*>(scratch);
  float* products = offsets + task.m * task.block_stride;
  SegmentRows segments[4];
  const size_t count = segment_rows(*task.weight, segments);
  size_t longest = 0;
  for (size_t s = 0; s < count; ++s) longest = larger(longest, segments[s].row_bytes);
  write_offsets(task, offsets);
  const auto compute = [&](auto kernel, size_t i, size_t j, size_t outputs) {
    kernel(task, i, j, outputs, segments, count, offsets, products);
  };
  if (task.m == 1 && longest > kShortRow) {
    for (size_t j = range.first; j < range.last; ++j) compute(dense_outputs<1, 1>, 0, j, 1);
    return;
  }
  for (size_t j = range.first, outputs; j < range.last; j += outputs) {
    outputs = range.last - j >= kDenseOutputs ? kDenseOutputs : 1;
    size_t i = 0;
    if (Vec::kRegisters == 32) {
      for (; i + 4 <= task.m; i += 4) compute(dense_outputs<4, kDenseOutputs>, i, j, outputs);
      for (; i + 2 <= task.m; i += 2) compute(dense_outputs<2, kDenseOutputs>, i, j, outputs);
    }
    for (; i < task.m; ++i) compute(dense_outputs<1, kDenseOutputs>, i, j, outputs);
  }
}

size_t dense_few_rows_scratch_bytes(const Task& task) {
  return task.m * (1 + kDenseOutputs) * task.block_stride * sizeof(float);
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
