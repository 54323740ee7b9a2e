// Says which part of the stored matrix lies in which segment, and where its scales are, for the loops of the kernels.
#pragma once

#include "simd/integers.h"
#include "weight/weight.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// Part of the stored matrix: whole blocks of columns, all within one segment.
struct Part {
  size_t segment, row_begin, row_end, begin, end;
};

// Calls visit(part) for the parts of rows [row_begin, row_end), columns [begin, end), whole blocks.
template <typename Visit>
inline void for_each_part(const Layout& layout, size_t row_begin, size_t row_end, size_t begin, size_t end,
                          Visit visit) {
  for (size_t i = 0; i < layout.segments.size(); ++i) {
    const Segment& s = layout.segments[i];
    const Part part{i, larger(row_begin, s.row_begin), smaller(row_end, s.row_end), larger(begin, s.column_begin),
                    smaller(end, s.column_end)};
    if (part.row_begin < part.row_end && part.begin < part.end) visit(part);
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

// Calls visit(Constant<…>) with a bit-width.
template <typename Visit>
inline void with_bits(int bits, Visit visit) {
  switch (bits) {
    case 8: return visit(Constant<8>{});
    case 4: return visit(Constant<4>{});
    case 3: return visit(Constant<3>{});
    default: return visit(Constant<2>{});
  }
}

// Where the scale of a row's block is; the following blocks are `scale_step` further each.
inline const uint16_t* first_scale(const Weight& w, size_t segment, size_t row) {
  const Layout& layout = *w.layout;
  if (!layout.n_of_m()) return w.scales + row * layout.blocks;
  const size_t in_segment = row - layout.segments[segment].row_begin;
  const size_t tile = w.index->starts[segment].tile + in_segment / kTileRows;
  return w.scales + tile * layout.blocks * kTileRows + in_segment % kTileRows;
}

inline size_t scale_step(const Layout& layout) { return layout.n_of_m() ? kTileRows : 1; }

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
