// Few rows of rounded activations times a dense weight, B = S.T, of which the packed chunks are read directly.
#pragma once

#include "decode.h"
#include "kernels.h"
#include "simd/vec.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kDenseOutputs = 4;  // at a time
constexpr size_t kFewRows = 4;

bool dense_supported(const Layout& layout, size_t m) {
  return m <= kFewRows && layout.trans_b && !layout.sparse() && bytes_fit(layout) && layout.block_size % kChunk == 0;
}

// What the rows of a tile have in one segment.
struct SegmentRows {
  int bits;
  const uint8_t* codes;  // of row 0
  size_t row_bytes;
  size_t block_begin, block_end;
};

// Adds to acc the products of `rows` rows of A with kDenseOutputs stored rows, over the blocks of one segment.
// b: the rows, at the segment's first column. products [rows][kDenseOutputs][stride]: scales of A times those of B.
// kChunks: of a block, if known at compile time, else 0.
template <int bits, size_t rows, size_t kChunks>
void dense_dot(const Task& task, size_t i, const SegmentRows& segment, const uint8_t* (&b)[kDenseOutputs],
               const float* products, Vec::Floats (&acc)[rows][kDenseOutputs]) {
  constexpr size_t kParts = kChunk / Vec::kBytes;
  const Layout& layout = *task.weight->layout;
  const size_t chunks = kChunks ? kChunks : layout.block_size / kChunk;
  const size_t stride = task.block_stride;
  // The same place in the next rows, if they fit in the first cache beside these.
  const size_t next_rows = kDenseOutputs * segment.row_bytes, ahead = next_rows <= 20480 ? next_rows : 2048;
  for (size_t block = segment.block_begin; block < segment.block_end; ++block) {
    const int8_t* a = task.block_codes(i, block);
    Vec::Ints totals[rows * kDenseOutputs];
    for (size_t j = 0; j < kDenseOutputs; ++j) prefetch(b[j], ahead);
    sum_in_runs<Vec, 1>(chunks, Vec::adds((1 << bits) - 1, 127) / kParts, totals, [&](size_t chunk, auto& sums) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kParts; ++v) {
        Vec::Bytes codes[rows];
        for (size_t r = 0; r < rows; ++r) codes[r] = Vec::load(a + (r * chunks + chunk) * kChunk + v * Vec::kBytes);
#pragma GCC unroll 4
        for (size_t j = 0; j < kDenseOutputs; ++j) {
          const Vec::Bytes weights = Vec::chunk<bits>(b[j] + chunk * (8 * bits), v);
          for (size_t r = 0; r < rows; ++r) Vec::add(sums[r * kDenseOutputs + j], weights, codes[r]);
        }
      }
    });
    for (size_t j = 0; j < kDenseOutputs; ++j) b[j] += chunks * (8 * bits);
    for (size_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (size_t j = 0; j < kDenseOutputs; ++j) {
        const size_t n = r * kDenseOutputs + j;
        acc[r][j] = Vec::multiply_add(Vec::floats(totals[n]), Vec::set(products[n * stride + block]), acc[r][j]);
      }
    }
  }
}

// A row's scales as floats, kLanes from block `block`: what lies past the row's end is anything.
inline Vec::Floats row_scales(const Weight& w, size_t row, size_t block) {
  const Layout& layout = *w.layout;
  const size_t place = row * layout.blocks() + block, all = layout.rows * layout.blocks();
  if (place + Vec::kLanes <= all) return Vec::halves(w.scales + place);
  uint16_t rest[Vec::kLanes] = {};
  std::memcpy(rest, w.scales + place, (all - place) * sizeof(uint16_t));
  return Vec::halves(rest);
}

// Outputs [first, first + outputs). segments: what their rows have in each. offsets [m][block_stride]: sums of the
// activations times what a zero code stands for. products: room for rows * kDenseOutputs * block_stride.
template <size_t rows>
void dense_outputs(const Task& task, size_t i, size_t first, size_t outputs, const SegmentRows* segments, size_t count,
                   const float* offsets, float* products) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t blocks = layout.blocks(), stride = task.block_stride;
  Vec::Floats acc[rows][kDenseOutputs];
  size_t row[kDenseOutputs];
  for (size_t j = 0; j < kDenseOutputs; ++j) {
    row[j] = first + smaller(j, outputs - 1);
    for (size_t r = 0; r < rows; ++r) acc[r][j] = Vec::zero();
    for (size_t block = 0; block < blocks; block += Vec::kLanes) {
      const Vec::Floats scales = row_scales(w, row[j], block);
      for (size_t r = 0; r < rows; ++r) {
        const size_t place = (i + r) * stride + block;
        acc[r][j] = Vec::multiply_add(Vec::load_floats(offsets + place), scales, acc[r][j]);
        Vec::store_floats(products + (r * kDenseOutputs + j) * stride + block,
                          Vec::multiply(Vec::load_floats(task.scales + place), scales));
      }
    }
  }
  for (size_t s = 0; s < count; ++s) {
    const SegmentRows& segment = segments[s];
    const uint8_t* b[kDenseOutputs];
    for (size_t j = 0; j < kDenseOutputs; ++j) b[j] = segment.codes + row[j] * segment.row_bytes;
    with_bits(segment.bits, [&](auto width) {
      constexpr int bits = decltype(width)::kValue;
      if constexpr (bits < 8 || Vec::kEightBits) {
        (layout.block_size == 2 * kChunk ? dense_dot<bits, rows, usual(2)>
         : layout.block_size == kChunk   ? dense_dot<bits, rows, usual(1)>
                                         : dense_dot<bits, rows, 0>)(task, i, segment, b, products, acc);
      }
    });
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t j = 0; j < outputs; ++j) {
      const float bias = task.bias ? task.bias[first + j] : 0.0f;
      task.y[(i + r) * layout.rows + first + j] = Vec::sum(acc[r][j]) + bias;
    }
  }
}

void dense_few_rows(const Task& task, size_t first, size_t last, float* offsets) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t stride = task.block_stride;
  float* products = offsets + task.m * stride;
  for_each_row_range(layout, first, last, [&](size_t begin, size_t end) {
    SegmentRows segments[4];
    size_t count = 0;
    std::memset(offsets, 0, task.m * stride * sizeof(float));
    for_each_part(layout, begin, begin + 1, 0, layout.columns, [&](const Part& part) {
      const Segment& segment = layout.segments[part.segment];
      const uint8_t* codes = w.codes + w.index->starts[part.segment].codes;
      const SegmentRows rows{segment.bits, codes - segment.row_begin * segment.row_bytes(), segment.row_bytes(),
                             part.begin / layout.block_size, part.end / layout.block_size};
      for (size_t i = 0; i < task.m; ++i) {
        for (size_t block = rows.block_begin; block < rows.block_end; ++block) {
          offsets[i * stride + block] = -segment.encoding.bias * task.sums[i * stride + block];
        }
      }
      segments[count++] = rows;
    });
    for (size_t j = begin; j < end; j += kDenseOutputs) {
      const size_t outputs = smaller(kDenseOutputs, end - j);
      size_t i = 0;
      if (Vec::kRegisters == 32) {
        for (; i + 4 <= task.m; i += 4) dense_outputs<4>(task, i, j, outputs, segments, count, offsets, products);
        for (; i + 2 <= task.m; i += 2) dense_outputs<2>(task, i, j, outputs, segments, count, offsets, products);
      }
      for (; i < task.m; ++i) dense_outputs<1>(task, i, j, outputs, segments, count, offsets, products);
    }
  });
}

size_t dense_scratch_bytes(const Task& task) {
  return task.m * (1 + kDenseOutputs) * task.block_stride * sizeof(float);
}

void dense_tile(const Task& task, size_t tile, void* scratch) {
  const size_t first = tile * task.tile_outputs;
  dense_few_rows(task, first, smaller(first + task.tile_outputs, task.weight->layout->rows),
                 static_cast<float*>(scratch));
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
