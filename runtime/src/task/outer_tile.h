// Says which outputs, and which part of the sum, a tile of a product with B = S computes.
#pragma once

#include "task/task.h"
#include "weight/parts.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// Outputs [first, last) of the stored rows [row_begin, row_end), to y [m, N], with the bias unless it is null.
struct OuterTile {
  size_t first, last, row_begin, row_end;
  const float* bias;
  float* y;
};

constexpr size_t kOuterDepth = 64;  // stored rows between additions to Y, of float32

constexpr size_t runs_of(size_t rows) { return (rows + kRun - 1) / kRun; }

// Where run number `run` of all begins; past the last: the end.
inline size_t run_begin(const Layout& layout, size_t run) {
  size_t before = 0, found = layout.rows;
  for_each_row_range(layout, 0, layout.rows, [&](size_t begin, size_t end) {
    const size_t runs = runs_of(end - begin);
    if (run >= before && run < before + runs) found = begin + (run - before) * kRun;
    before += runs;
  });
  return found;
}

inline OuterTile outer_tile_of(const Task& task, const Range& range) {
  const Layout& layout = *task.weight->layout;
  const size_t n = layout.columns;
  OuterTile tile;
  if (task.sum_parts == 1) {
    tile.first = range.first;
    tile.last = range.last;
    tile.row_begin = 0;
    tile.row_end = layout.rows;
    tile.bias = task.bias;
    tile.y = task.y;
    return tile;
  }
  size_t runs = 0;
  for_each_row_range(layout, 0, layout.rows, [&](size_t begin, size_t end) { runs += runs_of(end - begin); });
  tile.first = 0;
  tile.last = n;
  tile.row_begin = run_begin(layout, range.part * runs / task.sum_parts);
  tile.row_end = run_begin(layout, (range.part + 1) * runs / task.sum_parts);
  tile.bias = range.part ? nullptr : task.bias;
  tile.y = task.y + range.part * task.m * n;
  return tile;
}

// The task with the outputs of a tile.
inline Task task_of(const Task& task, const OuterTile& tile) {
  Task own = task;
  own.y = tile.y;
  own.bias = tile.bias;
  return own;
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
