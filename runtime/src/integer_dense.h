// Rounded activations times a dense weight, B = S.T. Few rows of activations read the packed chunks directly; many
// share a block of weights that has been decoded and turned so that lanes are outputs.
#pragma once

#include "decode.h"
#include "kernels.h"
#include "simd/vec.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kDenseOutputs = 4;  // outputs at a time: few rows
constexpr size_t kFewRows = 4;
constexpr size_t kTurnedRows = Vec::kRegisters == 32 ? 8 : 4;  // rows of activations at a time: many rows
constexpr size_t kTurnedOutputs = 2 * Vec::kLanes;

bool dense_supported(const Layout& layout, size_t) {
  const bool bytes_fit = Vec::kEightBits || layout.segments.front().bits < 8;
  return layout.trans_b && !layout.sparse() && bytes_fit && layout.block_size % kChunk == 0;
}

// --- few rows --------------------------------------------------------------------------------------------------

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
        (layout.block_size == 2 * kChunk ? dense_dot<bits, rows, 2>
         : layout.block_size == kChunk   ? dense_dot<bits, rows, 1>
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

// Calls visit(begin, end) for the rows [begin, end) below `last` that one segment of rows holds, or for all at once if
// the columns are cut.
template <typename Visit>
inline void for_each_row_range(const Layout& layout, size_t first, size_t last, Visit visit) {
  if (layout.columns_cut) return visit(first, last);
  for (const Segment& s : layout.segments) {
    const size_t begin = larger(first, s.row_begin), end = smaller(last, s.row_end);
    if (begin < end) visit(begin, end);
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

// --- many rows -------------------------------------------------------------------------------------------------

// One block of kTurnedOutputs outputs (`outputs` of them exist), turned: for every 4 columns the 4 bytes of each
// output.
template <int bits>
void turn_block(const uint8_t* rows_of_b, size_t row_bytes, size_t chunks, size_t outputs, uint8_t* turned) {
  alignas(64) uint8_t bytes[kTurnedOutputs * kChunk];
  if (outputs < kTurnedOutputs) std::memset(bytes, 0, sizeof bytes);
  for (size_t chunk = 0; chunk < chunks; ++chunk) {
    for (size_t j = 0; j < outputs; ++j) {
      unpack_chunk<bits>(rows_of_b + j * row_bytes + chunk * (8 * bits), bytes + j * kChunk);
    }
    uint8_t* out = turned + chunk * (kChunk * kTurnedOutputs);
    for (size_t half = 0; half < 2; ++half) {
      for (size_t v = 0; v < kChunk / Vec::kBytes; ++v) {
        Vec::transpose(bytes + half * Vec::kLanes * kChunk + v * Vec::kBytes, kChunk,
                       out + v * (Vec::kBytes / 4) * (2 * Vec::kBytes) + half * Vec::kBytes, 2 * Vec::kBytes);
      }
    }
  }
}

// y [rows][kTurnedOutputs] += the products of `rows` rows of A with a turned block. scales: of the outputs.
template <int bits, size_t rows>
void turned_kernel(const Task& task, size_t i, size_t block, const uint8_t* turned, const Vec::Floats (&scales)[2],
                   float bias, float* y) {
  const Layout& layout = *task.weight->layout;
  const int8_t* a = task.block_codes(i, block);
  Vec::Ints totals[rows * 2];
  sum_in_runs<Vec, 1>(layout.block_size / 4, Vec::adds((1 << bits) - 1, 127), totals, [&](size_t quad, auto& sums) {
    const Vec::Bytes left = Vec::load(turned + quad * (2 * Vec::kBytes));
    const Vec::Bytes right = Vec::load(turned + quad * (2 * Vec::kBytes) + Vec::kBytes);
#pragma GCC unroll 8
    for (size_t r = 0; r < rows; ++r) {
      const Vec::Bytes x = Vec::repeat4(a + r * layout.block_size + 4 * quad);
      Vec::add(sums[2 * r], left, x);
      Vec::add(sums[2 * r + 1], right, x);
    }
  });
  for (size_t r = 0; r < rows; ++r) {
    const size_t place = (i + r) * task.block_stride + block;
    const Vec::Floats a_scale = Vec::set(task.scales[place]), offset = Vec::set(-bias * task.sums[place]);
    for (size_t h = 0; h < 2; ++h) {
      float* out = y + r * kTurnedOutputs + h * Vec::kLanes;
      // (total · scale of A - bias · sum of A) · scale of B
      const Vec::Floats product = Vec::multiply_add(Vec::floats(totals[2 * r + h]), a_scale, offset);
      Vec::store_floats(out, Vec::multiply_add(product, scales[h], Vec::load_floats(out)));
    }
  }
}

void dense_many_rows(const Task& task, size_t first, size_t last, uint8_t* turned, float* y) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t chunks = layout.block_size / kChunk, blocks = layout.blocks();
  for_each_row_range(layout, first, last, [&](size_t row_begin, size_t row_end) {
    for (size_t j = row_begin; j < row_end; j += kTurnedOutputs) {
      const size_t outputs = smaller(kTurnedOutputs, row_end - j);
      std::memset(y, 0, task.m * kTurnedOutputs * sizeof(float));
      for_each_part(layout, j, j + outputs, 0, layout.columns, [&](const Part& part) {
        const Segment& segment = layout.segments[part.segment];
        const uint8_t* codes =
            w.codes + w.index->starts[part.segment].codes + (j - segment.row_begin) * segment.row_bytes();
        for (size_t block = part.begin / layout.block_size; block < part.end / layout.block_size; ++block) {
          float scales[kTurnedOutputs] = {};
          for (size_t o = 0; o < outputs; ++o) scales[o] = float_from_half(w.scales[(j + o) * blocks + block]);
          const Vec::Floats vectors[2] = {Vec::load_floats(scales), Vec::load_floats(scales + Vec::kLanes)};
          const size_t chunk = (block - part.begin / layout.block_size) * chunks;
          with_bits(segment.bits, [&](auto width) {
            constexpr int bits = decltype(width)::kValue;
            if constexpr (bits < 8 || Vec::kEightBits) {
              turn_block<bits>(codes + chunk * (8 * bits), segment.row_bytes(), chunks, outputs, turned);
              const float bias = segment.encoding.bias;
              size_t i = 0;
              for (; i + kTurnedRows <= task.m; i += kTurnedRows) {
                turned_kernel<bits, kTurnedRows>(task, i, block, turned, vectors, bias, y + i * kTurnedOutputs);
              }
              for (; i < task.m; ++i) {
                turned_kernel<bits, 1>(task, i, block, turned, vectors, bias, y + i * kTurnedOutputs);
              }
            }
          });
        }
      });
      for (size_t i = 0; i < task.m; ++i) {
        for (size_t o = 0; o < outputs; ++o) {
          const float bias = task.bias ? task.bias[j + o] : 0.0f;
          task.y[i * layout.rows + j + o] = y[i * kTurnedOutputs + o] + bias;
        }
      }
    }
  });
}

// --- tiles -----------------------------------------------------------------------------------------------------

size_t dense_scratch_bytes(const Task& task) {
  if (task.m <= kFewRows) return task.m * (1 + kDenseOutputs) * task.block_stride * sizeof(float);
  return task.weight->layout->block_size * kTurnedOutputs + task.m * kTurnedOutputs * sizeof(float);
}

void dense_tile(const Task& task, size_t tile, void* scratch) {
  const Layout& layout = *task.weight->layout;
  const size_t first = tile * task.tile_outputs, last = smaller(first + task.tile_outputs, layout.rows);
  if (task.m <= kFewRows) return dense_few_rows(task, first, last, static_cast<float*>(scratch));
  uint8_t* turned = static_cast<uint8_t*>(scratch);
  dense_many_rows(task, first, last, turned, reinterpret_cast<float*>(turned + layout.block_size * kTurnedOutputs));
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
