// Checks attributes and streams.
#include "weight/weight.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "simd/integers.h"

namespace fips {
namespace {

constexpr std::array<int, 4> kBitWidths = {8, 4, 3, 2};

void require(bool condition, const std::string& message) {
  if (!condition) throw InvalidWeight(message);
}

void require_flag(int64_t value, const char* name) {
  require(value == 0 || value == 1, std::string(name) + " must be 0 or 1, got " + std::to_string(value));
}

void require_size(size_t actual, size_t expected, const char* name) {
  require(actual == expected, std::string(name) + " has " + std::to_string(actual) + " bytes, expected " +
                                  std::to_string(expected));
}

Encoding encoding_of(int bits, bool midrise, bool sparse) {
  const uint64_t zero_point = uint64_t{1} << (bits - 1);
  Encoding encoding;
  if (midrise && sparse && bits < 8) {
    // Twice the scale of levels, so that zero lies between the levels as an integer.
    encoding.shift = 1;
    encoding.ones = kEveryByte;
    encoding.absent = kEveryByte * (2 * zero_point);
    encoding.bias = static_cast<float>(2 * zero_point);
    encoding.unit = 0.5f;
    return encoding;
  }
  encoding.shift = 0;
  encoding.ones = 0;
  encoding.absent = kEveryByte * zero_point;
  encoding.bias = static_cast<float>(zero_point) - (midrise ? 0.5f : 0.0f);
  encoding.unit = 1.0f;
  return encoding;
}

size_t packed_size(size_t count, int bits) { return (count * static_cast<size_t>(bits) + 7) / 8; }

// The integers 8 q … 8 q + 7 of a chunk of 2 or 3 bits (fips_ort/bits.py), a byte each.
uint64_t chunk_word(const uint8_t* chunk, int bits, size_t q) {
  uint64_t low;
  std::memcpy(&low, chunk + q % 2 * 8, 8);
  uint64_t word = (low >> (q / 2 * 2)) & (3 * kEveryByte);
  if (bits == 3) {
    uint64_t high;
    std::memcpy(&high, chunk + 16, 8);
    word |= ((high >> q) & kEveryByte) << 2;
  }
  return word;
}

// In a 2:m pattern, the indices in the first chunk of each pair of chunks are smaller than those in the second, but for
// the rows that fill up the last tile. Two rows take 8 integers.
bool pairs_ascend(const uint8_t* pattern, const Segment& segment, size_t steps, int bits) {
  const size_t chunk_bytes = 8 * static_cast<size_t>(bits);
  for (size_t tile = 0; tile < segment.tiles(); ++tile) {
    const size_t rows = std::min(kTileRows, segment.rows() - tile * kTileRows);
    for (size_t step = 0; step < steps; ++step, pattern += 2 * chunk_bytes) {
      for (size_t row = 0; row < rows; row += 2) {
        const uint64_t first = chunk_word(pattern, bits, row / 2);
        const uint64_t second = chunk_word(pattern + chunk_bytes, bits, row / 2);
        const uint64_t checked = row + 1 < rows ? 0x80 * kEveryByte : 0x80808080u;
        // The highest bit of a byte survives if its second index is larger.
        if ((((second | 0x80 * kEveryByte) - first - kEveryByte) & checked) != checked) return false;
      }
    }
  }
  return true;
}

}  // namespace

Layout::Layout(const Attributes& a) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  require(a.k >= 1 && a.k <= kLargest && a.n >= 1 && a.n <= kLargest,
          "K and N must be positive and below 2^31, got " + std::to_string(a.k) + " and " + std::to_string(a.n));
  require_flag(a.trans_b, "transB");
  require_flag(a.segment_axis, "segment_axis");
  require_flag(a.midrise, "midrise");
  require(a.accuracy_level == 0 || a.accuracy_level == 4,
          "accuracy_level must be 0 or 4, got " + std::to_string(a.accuracy_level));
  const bool known_pattern = (a.keep == 0 && a.of == 0) || (a.keep == 1 && a.of == 1) ||
                             ((a.keep == 1 || a.keep == 2) && (a.of == 4 || a.of == 8));
  require(known_pattern, "unsupported pattern: keep " + std::to_string(a.keep) + ", of " + std::to_string(a.of));

  trans_b = a.trans_b != 0;
  midrise = a.midrise != 0;
  columns_cut = a.segment_axis != 0;
  accuracy_level = static_cast<int>(a.accuracy_level);
  keep = static_cast<size_t>(a.keep);
  of = static_cast<size_t>(a.of);
  rows = static_cast<size_t>(trans_b ? a.n : a.k);
  columns = static_cast<size_t>(trans_b ? a.k : a.n);
  require(a.block_size >= 1 && columns % static_cast<size_t>(a.block_size) == 0,
          "block_size " + std::to_string(a.block_size) + " does not divide the " + std::to_string(columns) +
              " columns");
  block_size = static_cast<size_t>(a.block_size);
  blocks = columns / block_size;
  const size_t unit = of > 1 ? 8 * of / keep : 8;
  require(block_size % unit == 0,
          "block_size " + std::to_string(block_size) + " is not a multiple of " + std::to_string(unit));

  const size_t length = a.segment_axis ? columns : rows;
  size_t start = 0;
  for (size_t i = 0; i < kBitWidths.size(); ++i) {
    require(a.segments[i] >= 0 && static_cast<uint64_t>(a.segments[i]) <= length - start,
            "the segments do not add up to the " + std::to_string(length) + " entries of axis " +
                std::to_string(a.segment_axis));
    const size_t size = static_cast<size_t>(a.segments[i]);
    require(!a.segment_axis || size % block_size == 0,
            "a segment of " + std::to_string(size) + " columns is not a multiple of block_size " +
                std::to_string(block_size));
    if (size == 0) continue;
    Segment segment;
    segment.bits = kBitWidths[i];
    segment.row_begin = a.segment_axis ? 0 : start;
    segment.row_end = a.segment_axis ? rows : start + size;
    segment.column_begin = a.segment_axis ? start : 0;
    segment.column_end = a.segment_axis ? start + size : columns;
    segment.encoding = encoding_of(segment.bits, midrise, sparse());
    segments.push_back(segment);
    start += size;
  }
  require(start == length, "the segments add up to " + std::to_string(start) + ", not to the " +
                               std::to_string(length) + " entries of axis " + std::to_string(a.segment_axis));
}

bool Layout::needs_mask() const { return sparse() && midrise && segments.front().bits == 8; }

std::vector<Layout> Layout::row_layouts() const {
  std::vector<Layout> layouts;
  if (!trans_b || columns_cut || segments.size() == 1) return layouts;
  for (const Segment& segment : segments) {
    Layout layout = *this;
    layout.rows = segment.rows();
    layout.segments = {segment};
    layout.segments.front().row_begin = 0;
    layout.segments.front().row_end = layout.rows;
    layouts.push_back(std::move(layout));
  }
  return layouts;
}

size_t Layout::tiles() const {
  if (columns_cut) return segments.front().tiles();
  size_t count = 0;
  for (const Segment& segment : segments) count += segment.tiles();
  return count;
}

StreamIndex::StreamIndex(const Layout& layout, const uint8_t* pattern, size_t pattern_size, size_t codes_size) {
  const size_t step_columns = kStepGroups * layout.of;
  // Chunks of a segment: n:m.
  const auto chunks = [&](const Segment& segment) {
    return segment.tiles() * (segment.columns() / step_columns) * layout.keep;
  };
  size_t pattern_bytes = 0;
  for (const Segment& segment : layout.segments) {
    if (layout.n_of_m()) {
      pattern_bytes += chunks(segment) * 8 * static_cast<size_t>(layout.index_bits());
    } else if (layout.bitmap()) {
      pattern_bytes += packed_size(segment.entries(), 1);
    }
  }
  require_size(pattern_size, pattern_bytes, "pattern");

  size_t pattern_start = 0, codes_start = 0, tile = 0;
  for (const Segment& segment : layout.segments) {
    SegmentStart start{pattern_start, codes_start, tile, {}};
    const size_t bits = static_cast<size_t>(segment.bits);
    if (layout.bitmap()) {
      const size_t row_bytes = segment.columns() / 8;
      start.codes_before.reserve(segment.rows());
      size_t stored = 0;
      for (size_t row = 0; row < segment.rows(); ++row) {
        start.codes_before.push_back(stored);
        stored += count_bits(pattern + pattern_start, row_bytes);
        pattern_start += row_bytes;
      }
      codes_start += packed_size(stored, segment.bits);
    } else if (layout.n_of_m()) {
      require(layout.keep == 1 || pairs_ascend(pattern + pattern_start, segment, segment.columns() / step_columns,
                                               layout.index_bits()),
              "indices of the n:m pattern are not ascending");
      pattern_start += chunks(segment) * 8 * static_cast<size_t>(layout.index_bits());
      codes_start += chunks(segment) * 8 * bits;
      if (!layout.columns_cut) tile += segment.tiles();
    } else {
      codes_start += segment.rows() * segment.row_bytes();
    }
    starts.push_back(std::move(start));
  }
  require_size(codes_size, codes_start, "codes");

  std::vector<Layout> layouts = layout.row_layouts();
  for (size_t i = 0; i < layouts.size(); ++i) {
    const size_t row_begin = layout.segments[i].row_begin;
    const size_t scale_rows = layout.n_of_m() ? starts[i].tile * kTileRows : row_begin;
    starts[i].tile = 0;
    row_segments.push_back({std::move(layouts[i]), StreamIndex(std::move(starts[i])), row_begin,
                            scale_rows * layout.blocks});
  }
}

}  // namespace fips
