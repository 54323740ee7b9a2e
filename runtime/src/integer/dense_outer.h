// Multiplies activations with a dense weight, B = S, in integers: a row of the stored matrix is one step of the sum.
// The scales vary along the sum, so the activations are multiplied with them first, and then rounded to 15 bits in runs
// of kRun rows.
#pragma once

#include <cmath>

#include "decode/decode.h"
#include "decode/fields.h"
#include "integer/rounding.h"
#include "simd/vec.h"
#include "task/outer_tile.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr float kLargest = 16256.0f; // 127 · 128: an activation is 128 · high + low, low from -64 to 63
// Runs of smaller values, and of zeros, are rounded as if this were their largest: the scale stays a normal float, and
// its inverse finite.
constexpr float kSmallestMaximum = kLargest * 0x1p-126f;
constexpr size_t kQuads = kRun / 4;
constexpr size_t kGroup = 2 * Vec::kLanes;  // blocks of columns for which activations are rounded at a time

bool dense_outer_supported(const Layout& layout, size_t m) {
  // Many rows of A: two sums of bytes are no faster than one of floats without instructions for dot products.
  const bool pays = Vec::kUnlimited || m <= kFewRows;
  return pays && !layout.trans_b && !layout.sparse() && bytes_fit(layout) && layout.block_size % kChunk == 0;
}

// The activations of one row of A for a run and a block of columns, rounded.
struct Rounded {
  int8_t high[kRun], low[kRun];  // zeros after the last
  float scale;                   // of high · 128 + low
  float sum;                     // scale times the sum of all
};

// values [kRun] → rounded. maximum: of their magnitudes.
inline void round_run(const float* values, float maximum, Rounded& out) {
  maximum = maximum > kSmallestMaximum ? maximum : kSmallestMaximum;
  const Vec::Floats factor = Vec::Set(f32, kLargest / maximum), shift = Vec::Set(f32, kRounder);
  Vec::Floats sum = Vec::Zero(f32);
  for (size_t k = 0; k < kRun; k += Vec::kLanes) {
    const Vec::Floats shifted = Vec::MulAdd(Vec::LoadU(f32, values + k), factor, shift);
    const Vec::Ints code = Vec::Sub(Vec::BitCast(i32, shifted), Vec::Set(i32, kRounderBits));
    const Vec::Ints high = Vec::ShiftRight<7>(Vec::Add(code, Vec::Set(i32, 64)));
    Vec::StoreU(Vec::DemoteTo(i8_lane, high), out.high + k);
    Vec::StoreU(Vec::DemoteTo(i8_lane, Vec::Sub(code, Vec::ShiftLeft<7>(high))), out.low + k);
    sum = Vec::Add(sum, Vec::Sub(shifted, shift));  // exact: below 2^24
  }
  out.scale = maximum / kLargest;
  out.sum = out.scale * Vec::ReduceSum(f32, sum);
}

// Scales of `count` rows, the first `blocks` of each from `stored` on, a row every `stride` → by block, then zeros.
// end: of what may be read.
inline void turn_scales(const uint16_t* stored, size_t stride, size_t count, size_t blocks, const uint16_t* end,
                        uint16_t (&scales)[kGroup][kRun]) {
  const size_t read = (kRun - 1) * stride + kGroup;  // by whole vectors
  if (count == kRun && read <= static_cast<size_t>(end - stored)) {
    uint32_t pairs[kGroup / 2][kRun];  // two scales that are neighbours are turned as one
    for (size_t k = 0; k < kRun; k += Vec::kLanes) {
      Vec::Transpose(reinterpret_cast<const uint8_t*>(stored + k * stride), stride * sizeof(uint16_t),
                     reinterpret_cast<uint8_t*>(pairs[0] + k), sizeof pairs[0]);
    }
    for (size_t block = 0; block < blocks; ++block) {
      for (size_t k = 0; k < kRun; ++k) {
        scales[block][k] = static_cast<uint16_t>(pairs[block / 2][k] >> (block % 2 * 16));
      }
    }
    return;
  }
  for (size_t block = 0; block < blocks; ++block) {
    for (size_t k = 0; k < kRun; ++k) scales[block][k] = k < count ? stored[k * stride + block] : uint16_t{0};
  }
}

// Activations a [count] times the scales of each block, rounded: out[block * step]. All maxima come first: the CPU
// would wait for each of them. A block with a product that is not finite gets the scale NaN.
inline void round_scaled(const float* a, size_t count, const uint16_t (&scales)[kGroup][kRun], size_t blocks,
                         Rounded* out, size_t step) {
  float activations[kRun] = {}, scaled[kGroup][kRun];
  int32_t maxima[kGroup];  // bits of floats
  std::memcpy(activations, a, count * sizeof(float));
  for (size_t block = 0; block < blocks; ++block) {
    for (size_t k = 0; k < kRun; k += Vec::kLanes) {
      const Vec::Floats scale = Vec::PromoteTo(f32, Vec::LoadU(f16, scales[block] + k));
      Vec::StoreU(Vec::Mul(Vec::LoadU(f32, activations + k), scale), scaled[block] + k);
    }
    maxima[block] = largest_magnitude(scaled[block], kRun);
  }
  for (size_t block = 0; block < blocks; ++block) {
    Rounded& rounded = out[block * step];
    if (maxima[block] >= kInfinity) {
      std::memset(&rounded, 0, sizeof rounded);
      rounded.scale = rounded.sum = NAN;
      continue;
    }
    float maximum;
    std::memcpy(&maximum, &maxima[block], sizeof maximum);
    round_run(scaled[block], maximum, rounded);
  }
}

// y += totals · scale + offset. totals: of the vectors of Vec::Interleave4; place(i): where in y the columns of byte
// number i · kLanes and the next ones belong.
template <typename Place>
inline void add_run(const Vec::Ints (&totals)[4], Vec::Floats scale, Vec::Floats offset, float* y, Place place) {
  Vec::Floats products[4];
#pragma GCC unroll 4
  for (size_t q = 0; q < 4; ++q) products[q] = Vec::MulAdd(Vec::ConvertTo(f32, totals[q]), scale, offset);
  Vec::OrderLanes(products);
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    float* out = y + place(i);
    Vec::StoreU(Vec::Add(products[i], Vec::LoadU(f32, out)), out);
  }
}

// --- fields --------------------------------------------------------------------------------------------------------

// Codes that fill their bytes: rows are interleaved as they are stored, and the bytes taken apart after that
// (decode/fields.h).

// Whether a vector holds equal parts of blocks, or of one; of how many then.
template <int bits>
constexpr bool fields_fit(size_t block_size) {
  constexpr size_t kColumns = Fields<Vec, bits>::kColumns;
  return block_size % kColumns == 0 || kColumns % block_size == 0;
}

template <int bits>
constexpr size_t vector_blocks(size_t block_size) {
  constexpr size_t kColumns = Fields<Vec, bits>::kColumns;
  return block_size < kColumns ? kColumns / block_size : 1;
}

// A number of blocks as a template argument: no more than there can be of whole chunks.
template <int bits>
constexpr size_t usual_blocks(size_t count) {
  return smaller(count, larger(Fields<Vec, bits>::kColumns / kChunk, 1));
}

// kRun rows of one vector of stored bytes each, for one row of A. rounded: of the first of `blocks` blocks of columns
// that the vector holds in equal parts. ahead: as many bytes that are read soon. y: at the first column.
template <int bits, size_t blocks>
void outer_fields(const uint8_t* bytes, size_t row_bytes, const uint8_t* ahead, const Rounded* rounded, float bias,
                  float* y) {
  using F = Fields<Vec, bits>;
  // Vectors of interleaved bytes at a time: sums of their products with high and low are in registers.
  constexpr size_t kVectors = smaller(4, Vec::kRegisters / (4 * F::kCount)), kSums = kVectors * F::kCount;
  const auto of_blocks = [](const void* first) { return Vec::LoadDup32<blocks>(u8, first, sizeof(Rounded)); };
  Vec::Ints all[4 / kVectors][2 * kSums];
#pragma GCC unroll 4
  for (size_t pass = 0; pass < 4 / kVectors; ++pass) {
    const uint8_t* row = bytes;
    sum_in_runs<Vec, 1>(kQuads, Vec::Capacity((1 << bits) - 1, 127), all[pass], [&](size_t quad, auto& sums) {
      Vec::Bytes in[4], interleaved[4];
#pragma GCC unroll 4
      for (size_t k = 0; k < 4; ++k) in[k] = Vec::LoadU(u8, row + k * row_bytes);
      Vec::Interleave4(in, interleaved);
      if (pass == 0) prefetch_to_second_cache(ahead + quad * (4 * Vec::kBytes), 4 * Vec::kBytes);
      row += 4 * row_bytes;
      const Vec::Bytes high = of_blocks(rounded->high + 4 * quad), low = of_blocks(rounded->low + 4 * quad);
#pragma GCC unroll 4
      for (size_t q = 0; q < kVectors; ++q) {
#pragma GCC unroll 4
        for (size_t f = 0; f < F::kCount; ++f) {
          const Vec::Bytes weights = Vec::UnpackField<bits>(interleaved[pass * kVectors + q], f);
          Vec::Accumulate(sums[q * F::kCount + f], weights, high);
          Vec::Accumulate(sums[kSums + q * F::kCount + f], weights, low);
        }
      }
    });
  }
  float scales[blocks], offsets[blocks];
  for (size_t block = 0; block < blocks; ++block) {
    scales[block] = rounded[block].scale;
    offsets[block] = -bias * rounded[block].sum;
  }
  const Vec::Floats scale = Vec::BitCast(f32, Vec::LoadDup32<blocks>(u8, scales, sizeof(float)));
  const Vec::Floats offset = Vec::BitCast(f32, Vec::LoadDup32<blocks>(u8, offsets, sizeof(float)));
#pragma GCC unroll 4
  for (size_t f = 0; f < F::kCount; ++f) {
    Vec::Ints totals[4];
#pragma GCC unroll 4
    for (size_t q = 0; q < 4; ++q) {
      const Vec::Ints(&sums)[2 * kSums] = all[q / kVectors];
      const size_t n = q % kVectors * F::kCount + f;
      const Vec::Ints high = Vec::FieldTotal<bits>(sums[n], f), low = Vec::FieldTotal<bits>(sums[kSums + n], f);
      totals[q] = Vec::Add(Vec::ShiftLeft<7>(high), low);
    }
    add_run(totals, scale, offset, y, [f](size_t i) { return F::column(i * Vec::kLanes, f); });
  }
}

// --- chunks --------------------------------------------------------------------------------------------------------

// Four consecutive rows of a chunk, the four bytes of each column together, in the order of Vec::Interleave4: vector
// number q of part v.
template <int bits>
inline void interleave_rows(const uint8_t* row, size_t row_bytes, size_t v, Vec::Bytes (&out)[4]) {
  Vec::Bytes in[4];
#pragma GCC unroll 4
  for (size_t k = 0; k < 4; ++k) in[k] = Vec::UnpackChunk<bits>(row + k * row_bytes, v);
  Vec::Interleave4(in, out);
}

// y [Vec::kBytes] of part v of a chunk += a run's products. totals: of high, of low.
inline void add_chunk_run(const Vec::Ints (&totals)[8], const Rounded& a, float bias, float* y) {
  Vec::Ints both[4];
#pragma GCC unroll 4
  for (size_t q = 0; q < 4; ++q) both[q] = Vec::Add(Vec::ShiftLeft<7>(totals[q]), totals[4 + q]);
  add_run(both, Vec::Set(f32, a.scale), Vec::Set(f32, -bias * a.sum), y, [](size_t i) { return i * Vec::kLanes; });
}

// A chunk of kRun rows, read from the packed bytes: for one row of A. ahead: as many bytes that are read soon.
template <int bits>
void outer_direct(const uint8_t* chunk, size_t row_bytes, const uint8_t* ahead, const Rounded& a, float bias,
                  float* y) {
#pragma GCC unroll 4
  for (size_t v = 0; v < kChunkVectors; ++v) {
    Vec::Ints totals[8];
    const uint8_t* row = chunk;
    sum_in_runs<Vec, 1>(kQuads, Vec::Capacity((1 << bits) - 1, 127), totals, [&](size_t quad, auto& sums) {
      Vec::Bytes weights[4];
      interleave_rows<bits>(row, row_bytes, v, weights);
      if (v == 0 && quad % 2 == 0) prefetch_to_second_cache(ahead + quad * (32 * bits), 64 * bits);
      row += 4 * row_bytes;
      const Vec::Bytes high = Vec::LoadDup32(u8, a.high + 4 * quad), low = Vec::LoadDup32(u8, a.low + 4 * quad);
#pragma GCC unroll 4
      for (size_t q = 0; q < 4; ++q) {
        Vec::Accumulate(sums[q], weights[q], high);
        Vec::Accumulate(sums[4 + q], weights[q], low);
      }
    });
    add_chunk_run(totals, a, bias, y + v * Vec::kBytes);
  }
}

// The same chunk interleaved to memory, [part][quad of rows][4] vectors: for many rows of A.
template <int bits>
void interleave_chunk(const uint8_t* chunk, size_t row_bytes, uint8_t* out) {
#pragma GCC unroll 4
  for (size_t v = 0; v < kChunkVectors; ++v) {
    for (size_t quad = 0; quad < kQuads; ++quad) {
      Vec::Bytes weights[4];
      interleave_rows<bits>(chunk + 4 * quad * row_bytes, row_bytes, v, weights);
      for (size_t q = 0; q < 4; ++q) Vec::StoreU(weights[q], out + ((v * kQuads + quad) * 4 + q) * Vec::kBytes);
    }
  }
}

template <int bits>
void outer_interleaved(const uint8_t* interleaved, const Rounded& a, float bias, float* y) {
  for (size_t v = 0; v < kChunkVectors; ++v) {
    Vec::Ints totals[8];
    sum_in_runs<Vec, 1>(kQuads, Vec::Capacity((1 << bits) - 1, 127), totals, [&](size_t quad, auto& sums) {
      const Vec::Bytes high = Vec::LoadDup32(u8, a.high + 4 * quad), low = Vec::LoadDup32(u8, a.low + 4 * quad);
#pragma GCC unroll 4
      for (size_t q = 0; q < 4; ++q) {
        const Vec::Bytes weights = Vec::LoadU(u8, interleaved + ((v * kQuads + quad) * 4 + q) * Vec::kBytes);
        Vec::Accumulate(sums[q], weights, high);
        Vec::Accumulate(sums[4 + q], weights, low);
      }
    });
    add_chunk_run(totals, a, bias, y + v * Vec::kBytes);
  }
}

// --- tiles ---------------------------------------------------------------------------------------------------------

// Up to kRun rows of a segment, of whole blocks of columns.
struct RunOfRows {
  const uint8_t* codes;  // of the first row, at the first column
  size_t row_bytes, count, columns, block_size;
  const uint8_t* ahead;     // as many bytes that are read soon, in the order of memory
  const Rounded* rounded;   // [blocks, m]
  float bias;
};

// One row of A. y: at the first column. Returns how many columns are done: the others do not fill a vector.
template <int bits>
size_t outer_fields_of_run(const RunOfRows& run, float* y) {
  using F = Fields<Vec, bits>;
  constexpr size_t kWidth = F::kColumns;
  const size_t block_size = run.block_size;
  if (run.count < kRun || !fields_fit<bits>(block_size)) return 0;
  const size_t blocks = vector_blocks<bits>(block_size);
  const auto fields = blocks == 1   ? outer_fields<bits, 1>
                      : blocks == 2 ? outer_fields<bits, usual_blocks<bits>(2)>
                                    : outer_fields<bits, usual_blocks<bits>(4)>;
  const size_t vectors = run.columns / kWidth;
  for (size_t byte = 0; byte < vectors * Vec::kBytes; byte += Vec::kBytes) {
    const size_t column = F::column(byte, 0);
    fields(run.codes + byte, run.row_bytes, run.ahead + kRun * byte, run.rounded + column / block_size, run.bias,
           y + column);
  }
  return vectors * kWidth;
}

// y [m][width], at the first column, += the products of a run. interleaved: room for kRun * kChunk bytes.
template <int bits>
void outer_run(const RunOfRows& run, size_t m, size_t width, uint8_t* interleaved, float* y) {
  size_t column = 0;
  if constexpr (Fields<Vec, bits>::kFill && !Vec::kPlain) {  // plain C++ is no faster so
    if (m == 1) column = outer_fields_of_run<bits>(run, y);
  }
  for (; column < run.columns; column += kChunk) {
    const size_t byte = column / kChunk * (8 * bits);
    const uint8_t* chunk = run.codes + byte;
    size_t row_bytes = run.row_bytes;
    uint8_t whole[kRun * 8 * bits];
    if (run.count < kRun) {
      std::memset(whole, 0, sizeof whole);
      for (size_t k = 0; k < run.count; ++k) std::memcpy(whole + k * 8 * bits, chunk + k * row_bytes, 8 * bits);
      chunk = whole;
      row_bytes = 8 * bits;
    }
    const Rounded* rounded = run.rounded + column / run.block_size * m;
    if (m == 1) {
      outer_direct<bits>(chunk, row_bytes, run.ahead + kRun * byte, *rounded, run.bias, y + column);
      continue;
    }
    interleave_chunk<bits>(chunk, row_bytes, interleaved);
    for (size_t i = 0; i < m; ++i) {
      outer_interleaved<bits>(interleaved, rounded[i], run.bias, y + i * width + column);
    }
  }
}

size_t dense_outer_scratch_bytes(const Task& task) {
  return kRun * kChunk + task.m * (task.tile_outputs * sizeof(float) + kGroup * sizeof(Rounded));
}

void dense_outer_tile(const Task& task, const Range& outputs, void* scratch) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const OuterTile range = outer_tile_of(task, outputs);
  const size_t first = range.first, last = range.last, width = task.tile_outputs;
  uint8_t* interleaved = static_cast<uint8_t*>(scratch);
  float* y = reinterpret_cast<float*>(interleaved + kRun * kChunk);  // [m][width]
  Rounded* rounded = reinterpret_cast<Rounded*>(y + task.m * width);
  std::memset(y, 0, task.m * width * sizeof(float));
  for_each_part(layout, range.row_begin, range.row_end, first, last, [&](const Part& part) {
    const Segment& segment = layout.segments[part.segment];
    const uint8_t* codes = w.codes + w.index->starts[part.segment].codes;
    for (size_t run = part.row_begin; run < part.row_end; run += kRun) {
      const size_t count = smaller(kRun, part.row_end - run);
      for (size_t begin = part.begin, end; begin < part.end; begin = end) {
        end = smaller(begin + kGroup * layout.block_size, part.end);
        const size_t blocks = (end - begin) / layout.block_size;
        uint16_t scales[kGroup][kRun];
        turn_scales(w.scales + run * layout.blocks + begin / layout.block_size, layout.blocks, count, blocks,
                    w.scales + layout.rows * layout.blocks, scales);
        for (size_t i = 0; i < task.m; ++i) {
          round_scaled(task.a + i * layout.rows + run, count, scales, blocks, rounded + i, task.m);
        }
        with_bits(segment.bits, [&](auto bit_width) {
          constexpr int bits = decltype(bit_width)::kValue;
          if constexpr (bits < 8 || Vec::kEightBits) {
            const size_t row_bytes = segment.row_bytes();
            const uint8_t* rows = codes + (run - segment.row_begin) * row_bytes;
            const auto bytes_to = [](size_t columns) { return columns / kChunk * (8 * bits); };
            // Ahead is the next run, which follows in memory: the share of these columns.
            RunOfRows piece;
            piece.codes = rows + bytes_to(begin - segment.column_begin);
            piece.row_bytes = row_bytes;
            piece.count = count;
            piece.columns = end - begin;
            piece.block_size = layout.block_size;
            piece.ahead = rows + kRun * (row_bytes + bytes_to(begin - part.begin));
            piece.rounded = rounded;
            piece.bias = segment.encoding.bias;
            outer_run<bits>(piece, task.m, width, interleaved, y + (begin - first));
          }
        });
      }
    }
  });
  for (size_t i = 0; i < task.m; ++i) {
    for (size_t column = first; column < last; ++column) {
      const float bias = range.bias ? range.bias[column] : 0.0f;
      range.y[i * layout.columns + column] = y[i * width + (column - first)] + bias;
    }
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
