// What kernels leave in their working memory → Y.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// What a tile of a product with B = S computes: outputs [first, last) of the stored rows [row_begin, row_end), to y
// [m, N], with the bias unless it is null.
struct OuterTile {
  size_t first, last, row_begin, row_end;
  const float* bias;
  float* y;
};

// Calls visit(first row, rows) for what of the rows has runs of its own: segments of rows, or all.
template <typename Visit>
inline void for_each_row_segment(const Layout& layout, Visit visit) {
  if (layout.columns_cut) return visit(0, layout.rows);
  for (const Segment& segment : layout.segments) visit(segment.row_begin, segment.rows());
}

// Where run number `run` of all begins; past the last: the end.
inline size_t run_begin(const Layout& layout, size_t run) {
  size_t before = 0, begin = layout.rows;
  for_each_row_segment(layout, [&](size_t first, size_t rows) {
    const size_t runs = (rows + kRun - 1) / kRun;
    if (run >= before && run < before + runs) begin = first + (run - before) * kRun;
    before += runs;
  });
  return begin;
}

inline OuterTile outer_tile_of(const Task& task, size_t tile) {
  const Layout& layout = *task.weight->layout;
  const size_t n = layout.columns;
  if (task.parts == 1) {
    const size_t first = tile * task.tile_outputs;
    return {first, smaller(first + task.tile_outputs, n), 0, layout.rows, task.bias, task.y};
  }
  size_t runs = 0;
  for_each_row_segment(layout, [&](size_t, size_t rows) { runs += (rows + kRun - 1) / kRun; });
  return {0,
          n,
          run_begin(layout, tile * runs / task.parts),
          run_begin(layout, (tile + 1) * runs / task.parts),
          tile ? nullptr : task.bias,
          task.y + tile * task.m * n};
}

// Outputs [first, first + count) for every row of A from values [m][stride], with the bias.
inline void write_outputs(const Task& task, size_t first, size_t count, const float* values, size_t stride) {
  const size_t n = task.n();
  for (size_t i = 0; i < task.m; ++i) {
    for (size_t j = 0; j < count; ++j) {
      const float bias = task.bias ? task.bias[first + j] : 0.0f;
      task.y[i * n + first + j] = values[i * stride + j] + bias;
    }
  }
}

void add_parts(const float* parts, size_t count, size_t size, float* y) {
  size_t j = 0;
  for (; j + kLanes <= size; j += kLanes) {
    Vector sum = load(parts + j);
    for (size_t part = 1; part < count; ++part) sum += load(parts + part * size + j);
    store(y + j, sum);
  }
  for (; j < size; ++j) {
    y[j] = parts[j];
    for (size_t part = 1; part < count; ++part) y[j] += parts[part * size + j];
  }
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
