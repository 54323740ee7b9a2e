// Decodes a stored row to the floats that it stands for, exactly.
#pragma once

#include "decode/decode.h"
#include "simd/vec.h"
#include "weight/parts.h"

namespace fips {
namespace FIPS_ISA {
namespace {

constexpr size_t kValuesAtOnce = 256;

// A row of a dense weight, cut into segments of rows. A level has at most 9 bits and a scale 11: no product is rounded.
void decode_row(const Weight& w, size_t row, float* out) {
  const Layout& layout = *w.layout;
  const uint16_t* scales = w.scales + row * layout.blocks;
  uint8_t bytes[kValuesAtOnce];
  for (size_t block = 0; block < layout.blocks; ++block) {
    const size_t end = (block + 1) * layout.block_size;
    for (size_t begin = block * layout.block_size, last; begin < end; begin = last) {
      last = smaller(begin + kValuesAtOnce, end);
      for_each_part(layout, row, row + 1, begin, last, [&](const Part& part) {
        const Encoding& e = layout.segments[part.segment].encoding;
        const float scale = float_from_half(scales[block]) * e.unit;
        decode(w, part, bytes, 0, nullptr);
        for (size_t i = 0; i < last - begin; ++i) {
          out[begin + i] = (static_cast<float>(static_cast<int>(bytes[i])) - e.bias) * scale;
        }
      });
    }
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
