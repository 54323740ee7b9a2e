// Activations times a dense weight, B = S, in integers: a row of the stored matrix is one step of the sum. The scales
// vary along the sum, so the activations are multiplied with them first, and then rounded to 15 bits in runs of kRun
// rows.
#pragma once

#include <cmath>

#include "decode/decode.h"
#include "simd/vec.h"
#include "simd/vector.h"
#include "task/outer_tile.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr float kLargest = 16256.0f; // 127 · 128: an activation is 128 · high + low, low from -64 to 63
constexpr size_t kQuads = kRun / 4;
constexpr size_t kGroup = 2 * Vec::kLanes;  // blocks of columns for which activations are rounded at a time

bool outer_supported(const Layout& layout, size_t m) {
  // Many rows of A: two sums of bytes are no faster than one of floats without instructions for dot products.
  const bool pays = Vec::kUnlimited || m <= 4;
  return pays && !layout.trans_b && !layout.sparse() && bytes_fit(layout) && layout.block_size % kChunk == 0;
}

// The activations of one row of A for a run and a block of columns, rounded.
struct Rounded {
  int8_t high[kRun], low[kRun];  // zeros after the last
  float scale;                   // of high · 128 + low
  float sum;                     // scale times the sum of all
};

typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));

// The largest magnitude of values [kRun], as bits. Without their sign, floats are ordered as their bits are as
// integers; infinities and NaNs come last.
inline int32_t largest_of(const float* values) {
  Integers largest = {};
  for (size_t k = 0; k < kRun; k += kLanes) {
    const Integers magnitude = reinterpret_cast<Integers>(load(values + k)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return max_lanes(largest);
}

// values [kRun] → rounded. maximum: of their magnitudes.
inline void round_run(const float* values, float maximum, Rounded& out) {
  typedef int8_t Narrow __attribute__((vector_size(kLanes)));
  const Vector factor = broadcast(maximum > 0.0f ? kLargest / maximum : 0.0f);
  Vector sum = {};
  for (size_t k = 0; k < kRun; k += kLanes) {
    // Adding 1.5 · 2^23 leaves the integer nearest to the value in the lowest bits.
    const Vector shifted = load(values + k) * factor + 12582912.0f;
    const Integers code = reinterpret_cast<Integers>(shifted) - 0x4b400000;
    const Integers high = (code + 64) >> 7;
    const Narrow high8 = __builtin_convertvector(high, Narrow);
    const Narrow low8 = __builtin_convertvector(code - 128 * high, Narrow);
    std::memcpy(out.high + k, &high8, kLanes);
    std::memcpy(out.low + k, &low8, kLanes);
    sum += shifted - 12582912.0f;  // exact: below 2^24
  }
  out.scale = maximum / kLargest;
  out.sum = out.scale * sum_lanes(sum);
}

// Scales of `count` rows, the first `blocks` of each from `stored` on, a row every `stride` → by block, then zeros. end: of
// what may be read.
inline void turn_scales(const uint16_t* stored, size_t stride, size_t count, size_t blocks, const uint16_t* end,
                        uint16_t (&scales)[kGroup][kRun]) {
  const size_t read = (kRun - 1) * stride + kGroup;  // by whole vectors
  if (count == kRun && read <= static_cast<size_t>(end - stored)) {
    uint32_t pairs[kGroup / 2][kRun];  // two scales that are neighbours are turned as one
    for (size_t k = 0; k < kRun; k += Vec::kLanes) {
      Vec::transpose(reinterpret_cast<const uint8_t*>(stored + k * stride), stride * sizeof(uint16_t),
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

// Activations a [count] times the scales of each block, rounded: out[block * step]. All maxima come first: the CPU would
// wait for each of them. A block with a product that is not finite gets the scale NaN.
inline void round_scaled(const float* a, size_t count, const uint16_t (&scales)[kGroup][kRun], size_t blocks,
                         Rounded* out, size_t step) {
  float activations[kRun] = {}, scaled[kGroup][kRun];
  int32_t maxima[kGroup];  // bits of floats
  std::memcpy(activations, a, count * sizeof(float));
  for (size_t block = 0; block < blocks; ++block) {
    for (size_t k = 0; k < kRun; k += Vec::kLanes) {
      const Vec::Floats scale = Vec::halves(scales[block] + k);
      Vec::store_floats(scaled[block] + k, Vec::multiply(Vec::load_floats(activations + k), scale));
    }
    maxima[block] = largest_of(scaled[block]);
  }
  for (size_t block = 0; block < blocks; ++block) {
    Rounded& rounded = out[block * step];
    if (maxima[block] >= 0x7f800000) {
      std::memset(&rounded, 0, sizeof rounded);
      rounded.scale = rounded.sum = NAN;
      continue;
    }
    float maximum;
    std::memcpy(&maximum, &maxima[block], sizeof maximum);
    round_run(scaled[block], maximum, rounded);
  }
}

// y += totals · scale + offset. totals: of the vectors of Vec::interleave4; place(i): where in y the columns of byte
// number i · kLanes and the next ones belong.
template <typename Place>
inline void add_run(const Vec::Ints (&totals)[4], Vec::Floats scale, Vec::Floats offset, float* y, Place place) {
  Vec::Floats products[4];
#pragma GCC unroll 4
  for (size_t q = 0; q < 4; ++q) products[q] = Vec::multiply_add(Vec::floats(totals[q]), scale, offset);
  Vec::turn_lanes(products);
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    float* out = y + place(i);
    Vec::store_floats(out, Vec::multiply_add(products[i], Vec::set(1.0f), Vec::load_floats(out)));
  }
}

// --- fields --------------------------------------------------------------------------------------------------------

// Codes of 2 and 4 bits fill their bytes, so that rows can be interleaved as they are stored and the bytes taken apart
// after that: several columns at the price of one.
template <int bits>
struct Fields {
  static constexpr bool kUsed = !Vec::kPlain && (bits == 2 || bits == 4);  // plain C++ is no faster so
  static constexpr size_t kCount = 8 / bits;                // of a byte
  static constexpr size_t kColumns = Vec::kBytes * kCount;  // of a vector
  static constexpr size_t kPlane = 8 * bits;                // bytes of a chunk

  // Column of field `field` of byte `byte` of a row.
  static constexpr size_t column(size_t byte, size_t field) {
    return byte / kPlane * kChunk + byte % kPlane + field * kPlane;
  }

  // Whether a vector holds equal parts of blocks, or of one; of how many then.
  static constexpr bool fit(size_t block_size) { return block_size % kColumns == 0 || kColumns % block_size == 0; }
  static constexpr size_t blocks(size_t block_size) { return block_size < kColumns ? kColumns / block_size : 1; }
  // As a template argument: no more than there can be of whole chunks.
  static constexpr size_t usual_blocks(size_t count) { return smaller(count, larger(kColumns / kChunk, 1)); }
};

// kRun rows of one vector of stored bytes each, for one row of A. rounded: of the first of `blocks` blocks of columns
// that the vector holds in equal parts. ahead: as many bytes that are read soon. y: at the first column.
template <int bits, size_t blocks>
void outer_fields(const uint8_t* bytes, size_t row_bytes, const uint8_t* ahead, const Rounded* rounded, float bias,
                  float* y) {
  using F = Fields<bits>;
  // Vectors of interleaved bytes at a time: sums of their products with high and low are in registers.
  constexpr size_t kVectors = smaller(4, Vec::kRegisters / (4 * F::kCount)), kSums = kVectors * F::kCount;
  const auto of_blocks = [](const void* first) { return Vec::repeat4<blocks>(first, sizeof(Rounded)); };
  Vec::Ints all[4 / kVectors][2 * kSums];
#pragma GCC unroll 4
  for (size_t pass = 0; pass < 4 / kVectors; ++pass) {
    const uint8_t* row = bytes;
    sum_in_runs<Vec, 1>(kQuads, Vec::adds((1 << bits) - 1, 127), all[pass], [&](size_t quad, auto& sums) {
      Vec::Bytes in[4], interleaved[4];
#pragma GCC unroll 4
      for (size_t k = 0; k < 4; ++k) in[k] = Vec::load(row + k * row_bytes);
      Vec::interleave4(in, interleaved);
      if (pass == 0) prefetch_to_second_cache(ahead + quad * (4 * Vec::kBytes), 4 * Vec::kBytes);
      row += 4 * row_bytes;
      const Vec::Bytes high = of_blocks(rounded->high + 4 * quad), low = of_blocks(rounded->low + 4 * quad);
#pragma GCC unroll 4
      for (size_t q = 0; q < kVectors; ++q) {
#pragma GCC unroll 4
        for (size_t f = 0; f < F::kCount; ++f) {
          const Vec::Bytes weights = Vec::field<bits>(interleaved[pass * kVectors + q], f);
          Vec::add(sums[q * F::kCount + f], weights, high);
          Vec::add(sums[kSums + q * F::kCount + f], weights, low);
        }
      }
    });
  }
  float scales[blocks], offsets[blocks];
  for (size_t block = 0; block < blocks; ++block) {
    scales[block] = rounded[block].scale;
    offsets[block] = -bias * rounded[block].sum;
  }
  const Vec::Floats scale = Vec::as_floats(Vec::repeat4<blocks>(scales, sizeof(float)));
  const Vec::Floats offset = Vec::as_floats(Vec::repeat4<blocks>(offsets, sizeof(float)));
#pragma GCC unroll 4
  for (size_t f = 0; f < F::kCount; ++f) {
    Vec::Ints totals[4];
#pragma GCC unroll 4
    for (size_t q = 0; q < 4; ++q) {
      const Vec::Ints(&sums)[2 * kSums] = all[q / kVectors];
      const size_t n = q % kVectors * F::kCount + f;
      totals[q] = Vec::add_ints(Vec::shift7(Vec::field_total<bits>(sums[n], f)),
                                Vec::field_total<bits>(sums[kSums + n], f));
    }
    add_run(totals, scale, offset, y, [f](size_t i) { return F::column(i * Vec::kLanes, f); });
  }
}

// --- chunks --------------------------------------------------------------------------------------------------------

// Four consecutive rows of a chunk, the four bytes of each column together, in the order of Vec::interleave4: vector
// number q of part v.
template <int bits>
inline void interleave_rows(const uint8_t* row, size_t row_bytes, size_t v, Vec::Bytes (&out)[4]) {
  Vec::Bytes in[4];
#pragma GCC unroll 4
  for (size_t k = 0; k < 4; ++k) in[k] = Vec::chunk<bits>(row + k * row_bytes, v);
  Vec::interleave4(in, out);
}

// y [Vec::kBytes] of part v of a chunk += a run's products. totals: of high, of low.
inline void add_chunk_run(const Vec::Ints (&totals)[8], const Rounded& a, float bias, float* y) {
  Vec::Ints both[4];
#pragma GCC unroll 4
  for (size_t q = 0; q < 4; ++q) both[q] = Vec::add_ints(Vec::shift7(totals[q]), totals[4 + q]);
  add_run(both, Vec::set(a.scale), Vec::set(-bias * a.sum), y, [](size_t i) { return i * Vec::kLanes; });
}

// A chunk of kRun rows, read from the packed bytes: for one row of A. ahead: as many bytes that are read soon.
template <int bits>
void outer_direct(const uint8_t* chunk, size_t row_bytes, const uint8_t* ahead, const Rounded& a, float bias,
                  float* y) {
#pragma GCC unroll 4
  for (size_t v = 0; v < kChunk / Vec::kBytes; ++v) {
    Vec::Ints totals[8];
    const uint8_t* row = chunk;
    sum_in_runs<Vec, 1>(kQuads, Vec::adds((1 << bits) - 1, 127), totals, [&](size_t quad, auto& sums) {
      Vec::Bytes weights[4];
      interleave_rows<bits>(row, row_bytes, v, weights);
      if (v == 0 && quad % 2 == 0) prefetch_to_second_cache(ahead + quad * (32 * bits), 64 * bits);
      row += 4 * row_bytes;
      const Vec::Bytes high = Vec::repeat4(a.high + 4 * quad), low = Vec::repeat4(a.low + 4 * quad);
#pragma GCC unroll 4
      for (size_t q = 0; q < 4; ++q) {
        Vec::add(sums[q], weights[q], high);
        Vec::add(sums[4 + q], weights[q], low);
      }
    });
    add_chunk_run(totals, a, bias, y + v * Vec::kBytes);
  }
}

// The same chunk interleaved to memory, [part][quad of rows][4] vectors: for many rows of A.
template <int bits>
void interleave_chunk(const uint8_t* chunk, size_t row_bytes, uint8_t* out) {
#pragma GCC unroll 4
  for (size_t v = 0; v < kChunk / Vec::kBytes; ++v) {
    for (size_t quad = 0; quad < kQuads; ++quad) {
      Vec::Bytes weights[4];
      interleave_rows<bits>(chunk + 4 * quad * row_bytes, row_bytes, v, weights);
      for (size_t q = 0; q < 4; ++q) Vec::store(out + ((v * kQuads + quad) * 4 + q) * Vec::kBytes, weights[q]);
    }
  }
}

template <int bits>
void outer_interleaved(const uint8_t* interleaved, const Rounded& a, float bias, float* y) {
  for (size_t v = 0; v < kChunk / Vec::kBytes; ++v) {
    Vec::Ints totals[8];
    sum_in_runs<Vec, 1>(kQuads, Vec::adds((1 << bits) - 1, 127), totals, [&](size_t quad, auto& sums) {
      const Vec::Bytes high = Vec::repeat4(a.high + 4 * quad), low = Vec::repeat4(a.low + 4 * quad);
#pragma GCC unroll 4
      for (size_t q = 0; q < 4; ++q) {
        const Vec::Bytes weights = Vec::load(interleaved + ((v * kQuads + quad) * 4 + q) * Vec::kBytes);
        Vec::add(sums[q], weights, high);
        Vec::add(sums[4 + q], weights, low);
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
  using F = Fields<bits>;
  constexpr size_t kWidth = F::kColumns;
  const size_t block_size = run.block_size;
  if (run.count < kRun || !F::fit(block_size)) return 0;
  const auto fields = F::blocks(block_size) == 1   ? outer_fields<bits, 1>
                      : F::blocks(block_size) == 2 ? outer_fields<bits, F::usual_blocks(2)>
                                                   : outer_fields<bits, F::usual_blocks(4)>;
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
  if constexpr (Fields<bits>::kUsed) {
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

size_t outer_scratch_bytes(const Task& task) {
  return kRun * kChunk + task.m * (task.tile_outputs * sizeof(float) + kGroup * sizeof(Rounded));
}

// tile_outputs: whole blocks of columns.
void outer_integer_tile(const Task& task, size_t tile, void* scratch) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const OuterTile range = outer_tile_of(task, tile);
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
            outer_run<bits>({rows + bytes_to(begin - segment.column_begin), row_bytes, count, end - begin,
                             layout.block_size, rows + kRun * (row_bytes + bytes_to(begin - part.begin)), rounded,
                             segment.encoding.bias},
                            task.m, width, interleaved, y + (begin - first));
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
