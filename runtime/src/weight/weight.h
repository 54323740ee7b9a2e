// Describes packed weights as the kernels see them: sizes, where each segment's streams start, and the checks that make
// reading them safe. The byte formats are specified in fips_ort/packed.py and docs/ops.md.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace fips {

// A node's attributes or inputs do not describe a packed weight; what() says why.
struct InvalidWeight : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr size_t kChunk = 64;      // codes that are packed together (fips_ort/bits.py)
constexpr size_t kTileRows = 16;   // rows of a tile (n:m)
constexpr size_t kStepGroups = 4;  // groups of a step (n:m)

// The attributes of a node, as in the model. keep = of = 0: dense, 1: bitmap.
struct Attributes {
  int64_t k, n, trans_b, block_size, segment_axis;
  std::array<int64_t, 4> segments;
  int64_t midrise, accuracy_level, keep, of;
};

// How the bytes of one segment stand for levels. A decoded byte u means (u - bias) * unit; codes become bytes as
// (code << shift) | (ones & 1), and entries that are not stored become the byte `absent`.
struct Encoding {
  int shift;
  uint64_t ones;    // the same bit in each of 8 bytes
  uint64_t absent;  // the same byte 8 times
  float bias;
  float unit;
};

struct Segment {
  int bits;
  size_t row_begin, row_end, column_begin, column_end;
  Encoding encoding;

  size_t rows() const { return row_end - row_begin; }
  size_t columns() const { return column_end - column_begin; }
  size_t entries() const { return rows() * columns(); }
  // Of a dense row.
  size_t row_bytes() const { return columns() / 8 * static_cast<size_t>(bits); }
  size_t tiles() const { return (rows() + kTileRows - 1) / kTileRows; }
};

// The checked attributes. Stored matrix: rows x columns; segments in storage order, without the empty ones.
struct Layout {
  // Throws InvalidWeight.
  explicit Layout(const Attributes& attributes);

  size_t rows, columns, block_size;
  size_t blocks;  // of a row; kept, as to divide takes as long as 64 products
  bool trans_b, midrise;
  bool columns_cut;  // segments are ranges of columns, else of rows
  int accuracy_level;
  size_t keep, of;
  std::vector<Segment> segments;

  bool sparse() const { return keep != 0; }
  bool bitmap() const { return of == 1; }
  bool n_of_m() const { return of > 1; }
  int index_bits() const { return of == 8 ? 3 : of == 4 ? 2 : of == 1 ? 1 : 0; }
  // n:m: of all segments.
  size_t tiles() const;
  // No byte is left to mean "absent" beside 256 half-integer levels: decoding then fills a separate mask.
  bool needs_mask() const;
  // With trans_b, where the rows are cut into several segments: the layout of each alone. Else empty.
  std::vector<Layout> row_layouts() const;
};

struct RowSegment;

// Where each segment's bytes start. Of n:m also its first tile, of a bitmap how many of a segment's codes come before
// each of its rows.
struct StreamIndex {
  // Throws InvalidWeight if the sizes do not follow from the layout or the pattern is malformed.
  StreamIndex(const Layout& layout, const uint8_t* pattern, size_t pattern_size, size_t codes_size);

  struct SegmentStart {
    size_t pattern, codes;              // first byte of each
    size_t tile;
    std::vector<uint64_t> codes_before; // bitmap: [rows of the segment]
  };
  std::vector<SegmentStart> starts;
  // With trans_b, where the rows are cut: each segment as a weight of its own, so that its kernel need not fit the
  // others. Else empty.
  std::vector<RowSegment> row_segments;

 private:
  explicit StreamIndex(SegmentStart start) : starts{std::move(start)} {}
};

// A weight of one width. Its layout and index begin at row 0.
struct RowSegment {
  Layout layout;
  StreamIndex index;
  size_t row_begin;     // in the whole weight
  size_t scales_begin;  // in the whole weight's scales
};

class RowOrder;

// A weight in memory; nothing is owned. scales: float16 [rows, blocks], n:m [tiles, blocks, kTileRows].
struct Weight {
  const Layout* layout;
  const StreamIndex* index;
  const uint8_t* codes;
  size_t codes_size;
  const uint8_t* pattern;
  const uint16_t* scales;
  // [rows] and what follows from them, or null: rows have the order in which they are stored.
  const uint8_t* row_bits;
  const RowOrder* row_order;
};

}  // namespace fips
