// Decodes stored codes to one byte per entry, row by row, for the kernels that do not read packed weights directly.
#pragma once

#include "decode/bitmap.h"
#include "simd/vec.h"
#include "weight/parts.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// --- dense ---------------------------------------------------------------------------------------------------------

constexpr size_t kChunkVectors = kChunk / Vec::kBytes;

// The 64 integers of a chunk as bytes.
template <int bits>
inline void unpack_chunk(const uint8_t* chunk, uint8_t* out) {
#pragma GCC unroll 4
  for (size_t v = 0; v < kChunkVectors; ++v) Vec::StoreU(Vec::UnpackChunk<bits>(chunk, v), out + v * Vec::kBytes);
}

// One plane of a chunk of `width` integers, number n of them, as in fips_ort/bits.py.
inline uint8_t plane_field(const uint8_t* plane, size_t bits, size_t width, size_t n) {
  const size_t size = width / 8 * bits;
  return static_cast<uint8_t>((plane[n % size] >> (n / size * bits)) & ((1u << bits) - 1));
}

// The same for a chunk of fewer integers.
template <int bits>
inline void unpack_short_chunk(const uint8_t* chunk, size_t width, uint8_t* out) {
  for (size_t n = 0; n < width; ++n) {
    if constexpr (bits == 3) {
      const uint8_t high = plane_field(chunk + width / 4, 1, width, n);
      out[n] = static_cast<uint8_t>(plane_field(chunk, 2, width, n) | high << 2);
    } else {
      out[n] = plane_field(chunk, bits, width, n);
    }
  }
}

// Columns [begin, end) of a row of `columns`.
template <int bits>
void decode_dense(const uint8_t* row, size_t columns, size_t begin, size_t end, uint8_t* out) {
  while (begin < end) {
    const uint8_t* chunk = row + begin / kChunk * (8 * bits);
    const size_t offset = begin % kChunk, count = smaller(kChunk - offset, end - begin);
    const size_t width = smaller(kChunk, columns - begin / kChunk * kChunk);
    if (count == kChunk) {
      unpack_chunk<bits>(chunk, out);
    } else if (width < kChunk) {
      uint8_t all[kChunk];
      unpack_short_chunk<bits>(chunk, width, all);
      std::memcpy(out, all + offset, count);
    } else {
      uint8_t all[kChunk];
      unpack_chunk<bits>(chunk, all);
      std::memcpy(out, all + offset, count);
    }
    begin += count;
    out += count;
  }
}

// --- n:m -----------------------------------------------------------------------------------------------------------

// The integers of row `row` of a tile: its four fields of a chunk, a byte each.
template <int bits>
inline uint32_t row_fields(const uint8_t* chunk, size_t row) {
  if constexpr (bits == 3) {
    uint32_t high;
    std::memcpy(&high, chunk + 16 + row % 2 * 4, 4);
    return row_fields<2>(chunk, row) | ((high >> (row / 2)) & 0x01010101u) << 2;
  } else {
    uint32_t word;
    std::memcpy(&word, chunk + row % (2 * bits) * 4, 4);
    return (word >> (row / (2 * bits) * bits)) & (static_cast<uint32_t>(low_bits(bits)) * 0x01010101u);
  }
}

// A step of a row: its groups, each a word of as many bytes as it has columns.
template <int index_bits>
struct Groups;
template <>
struct Groups<2> {
  using Word = uint32_t;
  typedef uint32_t Words __attribute__((vector_size(4 * kStepGroups)));
};
template <>
struct Groups<3> {
  using Word = uint64_t;
  typedef uint64_t Words __attribute__((vector_size(8 * kStepGroups)));
};

// Columns [begin, end) of row `row` of a segment, whole steps. `kept` (0 or 1) unless null.
template <int bits, int index_bits>
void decode_n_of_m(const Layout& layout, const Segment& segment, const uint8_t* codes, const uint8_t* pattern,
                   size_t row, size_t begin, size_t end, uint8_t* out, uint8_t* kept) {
  typedef typename Groups<index_bits>::Words Words;
  // Four bytes of a word, one in each lane.
  const auto spread = [](uint32_t word, Words& out) { out = (Words{} + word) >> Words{0, 8, 16, 24} & 0xff; };
  const Encoding& e = segment.encoding;
  const size_t steps = segment.columns() / (kStepGroups << index_bits), first = begin / (kStepGroups << index_bits);
  const size_t last = end / (kStepGroups << index_bits);
  const auto one = static_cast<typename Groups<index_bits>::Word>(e.ones & 1);
  Words absent;
  std::memset(&absent, static_cast<uint8_t>(e.absent), sizeof absent);
  for (size_t step = first; step < last; ++step, out += sizeof(Words)) {
    Words words = absent, marks = {};
    for (size_t slot = 0; slot < layout.keep; ++slot) {
      const size_t chunk = (row / kTileRows * steps + step) * layout.keep + slot;
      Words level, place;
      spread(row_fields<bits>(codes + chunk * (8 * bits), row % kTileRows), level);
      spread(row_fields<index_bits>(pattern + chunk * (8 * index_bits), row % kTileRows), place);
      words ^= ((level << e.shift | one) ^ (absent & 0xff)) << 8 * place;
      marks |= (Words{} + 1) << 8 * place;
    }
    std::memcpy(out, &words, sizeof words);
    if (kept) {
      std::memcpy(kept, &marks, sizeof marks);
      kept += sizeof marks;
    }
  }
}

// --- any ---------------------------------------------------------------------------------------------------------

// Whether integer sums take the bytes of all segments.
inline bool bytes_fit(const Layout& layout) { return Vec::kEightBits || layout.segments.front().bits < 8; }

// Bytes (Encoding) of a part, a row every `stride` bytes; `kept` (0 or 1, of one row) unless null.
void decode(const Weight& w, const Part& part, uint8_t* out, size_t stride, uint8_t* kept) {
  const Layout& layout = *w.layout;
  const Segment& segment = layout.segments[part.segment];
  const StreamIndex::SegmentStart& start = w.index->starts[part.segment];
  const size_t begin = part.begin - segment.column_begin, end = part.end - segment.column_begin;
  const uint8_t* codes = w.codes + start.codes;
  const uint8_t* pattern = w.pattern + start.pattern;
  with_bits(segment.bits, [&](auto width) {
    constexpr int bits = decltype(width)::kValue;
    const size_t last = part.row_end - segment.row_begin;
    if (layout.bitmap() && !kept && end - begin == segment.columns() && stride == end) {
      // Rows that follow each other in the streams and in memory alike are one.
      const size_t row = part.row_begin - segment.row_begin;
      return decode_bitmap<bits>(codes, w.codes + w.codes_size, start.codes_before[row], pattern + row * end / 8,
                                 (last - row) * end, segment.encoding, out, nullptr);
    }
    for (size_t row = part.row_begin - segment.row_begin; row < last; ++row, out += stride) {
      if (!layout.sparse()) {
        decode_dense<bits>(codes + row * segment.row_bytes(), segment.columns(), begin, end, out);
      } else if (layout.bitmap()) {
        const uint8_t* bitmap = pattern + row * segment.columns() / 8;
        const uint64_t first = start.codes_before[row] + count_bits(bitmap, begin / 8);
        decode_bitmap<bits>(codes, w.codes + w.codes_size, first, bitmap + begin / 8, end - begin, segment.encoding,
                            out, kept);
      } else if (layout.of == 4) {
        decode_n_of_m<bits, 2>(layout, segment, codes, pattern, row, begin, end, out, kept);
      } else {
        decode_n_of_m<bits, 3>(layout, segment, codes, pattern, row, begin, end, out, kept);
      }
    }
  });
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
