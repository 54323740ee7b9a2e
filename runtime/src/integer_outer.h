// Activations times a dense weight, B = S, in integers: a row of the stored matrix is one step of the sum. The scales
// vary along the sum, so the activations are multiplied with them first, and then rounded to 15 bits in runs of kRun
// rows.
#pragma once

#include <cmath>

#include "decode.h"
#include "kernels.h"
#include "outer_tile.h"
#include "simd/vec.h"
#include "vector.h"

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

// values [kRun] → rounded. A run with a value that is not finite gets the scale NaN.
inline void round_run(const float* values, Rounded& out) {
  typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
  typedef int8_t Narrow __attribute__((vector_size(kLanes)));
  // Without their sign, floats are ordered as their bits are as integers; infinities and NaNs come last.
  Integers largest = {};
  for (size_t k = 0; k < kRun; k += kLanes) {
    const Integers magnitude = reinterpret_cast<Integers>(load(values + k)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  const int32_t bits = max_lanes(largest);
  if (bits >= 0x7f800000) {
    std::memset(&out, 0, sizeof out);
    out.scale = out.sum = NAN;
    return;
  }
  float maximum;
  std::memcpy(&maximum, &bits, 4);
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

// Activations a [count] times the scales of a block, rounded.
inline void round_scaled(const float* a, size_t count, const uint16_t (&scales)[kRun], Rounded& out) {
  float scaled[kRun] = {};
  std::memcpy(scaled, a, count * sizeof(float));
  for (size_t k = 0; k < kRun; k += Vec::kLanes) {
    Vec::store_floats(scaled + k, Vec::multiply(Vec::load_floats(scaled + k), Vec::halves(scales + k)));
  }
  round_run(scaled, out);
}

// Four consecutive rows of a chunk, the four bytes of each column together, in the order of Vec::interleave4: vector
// number q of part v.
template <int bits>
inline void interleave_rows(const uint8_t* row, size_t row_bytes, size_t v, Vec::Bytes (&out)[4]) {
  Vec::Bytes in[4];
#pragma GCC unroll 4
  for (size_t k = 0; k < 4; ++k) in[k] = Vec::chunk<bits>(row + k * row_bytes, v);
  Vec::interleave4(in, out);
}

// y [4 · kLanes] of part v of a chunk += a run's products, in the order of interleaved columns. totals: of high, of
// low.
inline void add_run(const Vec::Ints (&totals)[8], const Rounded& a, float bias, float* y) {
  const Vec::Floats scale = Vec::set(a.scale), offset = Vec::set(-bias * a.sum);
  for (size_t q = 0; q < 4; ++q) {
    const Vec::Ints total = Vec::add_ints(Vec::shift7(totals[q]), totals[4 + q]);
    float* out = y + q * Vec::kLanes;
    const Vec::Floats product = Vec::multiply_add(Vec::floats(total), scale, offset);
    Vec::store_floats(out, Vec::multiply_add(product, Vec::set(1.0f), Vec::load_floats(out)));
  }
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
    add_run(totals, a, bias, y + v * 4 * Vec::kLanes);
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
    add_run(totals, a, bias, y + v * 4 * Vec::kLanes);
  }
}

// Vec::kBytes sums in the order of interleaved columns, plus the bias unless it is null → y in that of columns.
inline void write_interleaved(const float* sums, const float* bias, float* y) {
  typedef float Four __attribute__((vector_size(16)));
  // Within each 16 columns, lane 4 g + c of vector q holds column 16 g + 4 q + c.
  for (size_t g = 0; g < Vec::kLanes / 4; ++g) {
    for (size_t q = 0; q < 4; ++q) {
      Four sum, offset = {};
      std::memcpy(&sum, sums + q * Vec::kLanes + 4 * g, sizeof sum);
      if (bias) std::memcpy(&offset, bias + 16 * g + 4 * q, sizeof offset);
      sum += offset;
      std::memcpy(y + 16 * g + 4 * q, &sum, sizeof sum);
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
  float* y = reinterpret_cast<float*>(interleaved + kRun * kChunk);  // [m][width], columns of a chunk in Vec's order
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
        turn_scales(w.scales + run * layout.blocks() + begin / layout.block_size, layout.blocks(), count, blocks,
                    w.scales + layout.rows * layout.blocks(), scales);
        // All before the products: of one block alone, the CPU would wait for each step to end.
        for (size_t block = 0; block < blocks; ++block) {
          for (size_t i = 0; i < task.m; ++i) {
            round_scaled(task.a + i * layout.rows + run, count, scales[block], rounded[block * task.m + i]);
          }
        }
        for (size_t column = begin; column < end; column += kChunk) {
          const size_t block = (column - begin) / layout.block_size;
          float* out = y + (column - first);
          with_bits(segment.bits, [&](auto bit_width) {
            constexpr int bits = decltype(bit_width)::kValue;
            if constexpr (bits < 8 || Vec::kEightBits) {
              size_t row_bytes = segment.row_bytes();
              const uint8_t* rows = codes + (run - segment.row_begin) * row_bytes;
              const uint8_t* chunk = rows + (column - segment.column_begin) / kChunk * (8 * bits);
              // Of the next run, which follows in memory, this chunk's share in order.
              const uint8_t* ahead = rows + kRun * (row_bytes + (column - part.begin) / kChunk * (8 * bits));
              uint8_t whole[kRun * 8 * bits];
              if (count < kRun) {
                std::memset(whole, 0, sizeof whole);
                for (size_t k = 0; k < count; ++k) std::memcpy(whole + k * 8 * bits, chunk + k * row_bytes, 8 * bits);
                chunk = whole;
                row_bytes = 8 * bits;
              }
              const float bias = segment.encoding.bias;
              if (task.m == 1) {
                return outer_direct<bits>(chunk, row_bytes, ahead, rounded[block * task.m], bias, out);
              }
              interleave_chunk<bits>(chunk, row_bytes, interleaved);
              for (size_t i = 0; i < task.m; ++i) {
                outer_interleaved<bits>(interleaved, rounded[block * task.m + i], bias, out + i * width);
              }
            }
          });
        }
      }
    }
  });
  for (size_t i = 0; i < task.m; ++i) {
    for (size_t column = first; column < last; column += Vec::kBytes) {
      const float* bias = range.bias ? range.bias + column : nullptr;
      write_interleaved(y + i * width + (column - first), bias, range.y + i * layout.columns + column);
    }
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
