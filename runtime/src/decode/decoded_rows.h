// Computes outputs four at a time, each from a stored row that has been decoded to bytes: for layouts without kernels
// of their own, and for few rows of float32 activations.
#pragma once

#include "decode/decode.h"
#include "simd/vec.h"
#include "task/task.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kDotOutputs = 4;   // at a time
constexpr size_t kDecodedRows = 2;  // rows of rounded activations at a time

// kDotOutputs decoded rows: a byte u of block b means (u - biases[b]) * scales[b]. After the last block scales are zero
// up to a multiple of Vec::kLanes, and biases finite. Outputs past the end repeat the last row: computed, never stored.
struct DecodedRows {
  const uint8_t* bytes[kDotOutputs];
  const float* scales[kDotOutputs];
  const float* biases[kDotOutputs];
  float* products;  // room for kDecodedRows * kDotOutputs times block_stride floats
};

// Scratch memory of decode_rows: bytes, scales and biases of each row, products. Rows of floats have room for one
// vector that starts at the last block.
size_t decoded_floats(const Layout& layout) { return round_up(layout.blocks, Vec::kLanes) + Vec::kLanes; }

size_t decoded_bytes(const Layout& layout) {
  return kDotOutputs * (round_up(layout.columns, 64) + (2 + kDecodedRows) * decoded_floats(layout) * sizeof(float));
}

// The first `count` scales, `step` apart, as floats, then zeros.
inline Vec::Floats load_scales(const uint16_t* halves, size_t count, size_t step) {
  if (step == 1) return Vec::PromoteTo(f32, Vec::LoadN(f16, halves, count));
  float floats[Vec::kLanes] = {};
  for (size_t i = 0; i < smaller(count, Vec::kLanes); ++i) floats[i] = float_from_half(halves[i * step]);
  return Vec::LoadU(f32, floats);
}

DecodedRows decode_rows(const Weight& w, size_t first, size_t outputs, void* scratch) {
  const Layout& layout = *w.layout;
  const size_t blocks = layout.blocks, padded_blocks = round_up(blocks, Vec::kLanes);
  const size_t byte_stride = round_up(layout.columns, 64), float_stride = decoded_floats(layout);
  uint8_t* bytes = static_cast<uint8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(bytes + kDotOutputs * byte_stride);
  float* biases = scales + kDotOutputs * float_stride;
  for_each_part(layout, first, first + outputs, 0, layout.columns, [&](const Part& part) {
    const Encoding& e = layout.segments[part.segment].encoding;
    const size_t begin = part.begin / layout.block_size;
    const size_t end = part.end == layout.columns ? padded_blocks : part.end / layout.block_size;
    for (size_t row = part.row_begin; row < part.row_end; ++row) {
      const size_t place = (row - first) * float_stride;
      // The last vector may reach into the next part of the row, which is written later.
      for (size_t block = begin; block < end; block += Vec::kLanes) {
        const size_t count = block < blocks ? blocks - block : 0;
        const uint16_t* halves = first_scale(w, part.segment, row) + block * scale_step(layout);
        const Vec::Floats stored = load_scales(halves, count, scale_step(layout));
        Vec::StoreU(Vec::Mul(stored, Vec::Set(f32, e.unit)), scales + place + block);
        Vec::StoreU(Vec::Set(f32, e.bias), biases + place + block);
      }
    }
    decode(w, part, bytes + (part.row_begin - first) * byte_stride + part.begin, byte_stride, nullptr);
  });
  DecodedRows decoded;
  for (size_t j = 0; j < kDotOutputs; ++j) {
    const size_t row = smaller(j, outputs - 1);
    decoded.bytes[j] = bytes + row * byte_stride;
    decoded.scales[j] = scales + row * float_stride;
    decoded.biases[j] = biases + row * float_stride;
  }
  decoded.products = biases + kDotOutputs * float_stride;
  return decoded;
}

// Outputs of a tile, with decoded rows: `kernel` takes `rows` rows of A at a time, `single` the rest one by one.
using DecodedKernel = void (*)(const Task& task, const DecodedRows& decoded, size_t i, size_t first, size_t outputs);

template <size_t rows>
void decoded_tile(const Task& task, const Range& range, void* scratch, DecodedKernel kernel, DecodedKernel single) {
  for (size_t first = range.first; first < range.last; first += kDotOutputs) {
    const size_t outputs = smaller(kDotOutputs, range.last - first);
    const DecodedRows decoded = decode_rows(*task.weight, first, outputs, scratch);
    for (size_t i = 0; i < task.m;) {
      const bool full = task.m - i >= rows;
      (full ? kernel : single)(task, decoded, i, first, outputs);
      i += full ? rows : 1;
    }
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
