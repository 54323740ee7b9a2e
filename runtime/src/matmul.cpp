// Brings activations into a range, rounds them, cuts a product into tiles for the threads, and adds what the parts of a
// sum give.

#include "matmul.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "memory.h"
#include "simd/integers.h"
#include "weight/row_order.h"

namespace fips {
namespace {

// Magnitudes of activations that are multiplied as they are, as bits of floats: scales and levels (up to 2^16 and 2^8)
// and sums of up to 2^31 terms neither overflow then nor become subnormal. A row of others, 0 aside, is brought there.
constexpr int32_t kSmallest = (127 - 64) << 23, kLargest = (127 + 64) << 23;
constexpr float kUp = 0x1p64f, kDown = 0x1p-64f;
// How many parts a sum is cut into.
constexpr size_t kSumParts = 8;
// What a tile has of stored rows at least and at most, and into how many tiles they are cut between that.
constexpr size_t kLeastRows = 16, kMostRows = 64, kRowTiles = 16;
// What a tile has of rows in an order of their own, at least and at most: the rows of a rare width should be many enough
// to be read at the speed of memory, and to fill what kernels compute at once. And what it has of outputs at most, but
// for the least rows: they wait in the second cache for being merged.
constexpr size_t kLeastOrdered = 256, kMostOrdered = 2048, kOrderedOutputs = 1 << 16;
// The same of columns.
constexpr size_t kLeastColumns = 64, kMostColumns = 256, kColumnTiles = 8;

// A product, for the threads. tasks: one for each part of the weight that has a kernel of its own.
struct Job {
  const Kernels* kernels;
  const Weight* weight;
  const Task* tasks;
  size_t count;
  std::array<size_t, 5> tile_begins;  // first tile of each task, then the end
  size_t kernel_bytes, scratch_bytes;
  std::atomic<bool> out_of_memory{false};
};

// Outputs in an order of their own: those of a tile from each task in turn, which leave them in the order of storage.
void run_ordered_tile(const Job& job, size_t tile, void* scratch) {
  const Task& whole = job.tasks[0];
  const RowOrder& order = *job.weight->row_order;
  const size_t n = job.weight->layout->rows, stride = whole.tile_outputs;
  const size_t first = tile * stride, last = std::min(first + stride, n);
  float* const values = reinterpret_cast<float*>(static_cast<char*>(scratch) + job.kernel_bytes);  // [m][stride]
  size_t begins[4] = {};
  for (size_t i = 0, place = 0; i < job.count; ++i) {
    const size_t begin = order.before(first, i), end = order.before(last, i);
    begins[i] = place;
    if (begin == end) continue;
    Task task = job.tasks[i];
    task.y = values + place;
    task.y_stride = stride;
    task.y_first = begin;
    task.bias = nullptr;
    job.kernels->tile(task, {begin, end, 0}, scratch);
    place += end - begin;
  }
  for (size_t i = 0; i < whole.m; ++i) {
    float* const y = whole.y + i * n + first;
    job.kernels->merge_rows(*job.weight->layout, job.weight->row_bits + first, last - first, values + i * stride, begins,
                            y);
    if (!whole.bias) continue;
    for (size_t j = 0; j < last - first; ++j) y[j] += whole.bias[first + j];
  }
}

void run_tile(void* data, size_t tile) {
  Job& job = *static_cast<Job*>(data);
  void* scratch = thread_scratch(job.scratch_bytes);
  if (!scratch) {
    job.out_of_memory = true;
    return;
  }
  if (job.weight->row_order) return run_ordered_tile(job, tile, scratch);
  size_t i = 0;
  while (tile >= job.tile_begins[i + 1]) ++i;
  const Task& task = job.tasks[i];
  const size_t number = tile - job.tile_begins[i], first = number * task.tile_outputs;
  const Range range = task.sum_parts > 1 ? Range{0, task.n(), number}
                                         : Range{first, std::min(first + task.tile_outputs, task.n()), 0};
  job.kernels->tile(task, range, scratch);
}

bool is_small(const Layout& layout, size_t m) { return layout.rows * layout.columns * m < kSmallestParallelWork; }

void run_tiles(const Weight& weight, const Task* tasks, size_t count, const Kernels& kernels,
               const ParallelFor& parallel_for) {
  const auto tiles_of = [](const Task& task, size_t n) {
    return task.sum_parts > 1 ? task.sum_parts : (n + task.tile_outputs - 1) / task.tile_outputs;
  };
  Job job{&kernels, &weight, tasks, count, {}, 0, 0};
  for (size_t i = 0; i < count; ++i) {
    job.kernel_bytes = std::max(job.kernel_bytes, round_up(kernels.scratch_bytes(tasks[i]), kAlignment));
    job.tile_begins[i + 1] = job.tile_begins[i] + tiles_of(tasks[i], tasks[i].n());
  }
  job.scratch_bytes = job.kernel_bytes;
  size_t tiles = job.tile_begins[count];
  if (weight.row_order) {
    job.scratch_bytes += tasks[0].m * tasks[0].tile_outputs * sizeof(float);
    tiles = tiles_of(tasks[0], weight.layout->rows);
  }
  if (tiles == 1 || is_small(*weight.layout, tasks[0].m)) {
    for (size_t tile = 0; tile < tiles; ++tile) run_tile(&job, tile);
  } else {
    parallel_for.run(parallel_for.context, tiles, run_tile, &job);
  }
  if (job.out_of_memory) throw std::bad_alloc();
}

void run(const Weight& weight, Task* tasks, size_t count, const Kernels& kernels, const ParallelFor& parallel_for) {
  Task& task = tasks[0];
  if (task.sum_parts == 1) return run_tiles(weight, tasks, count, kernels, parallel_for);
  const size_t size = task.m * task.n();
  const AlignedArray<float> parts(task.sum_parts * size);
  float* const y = task.y;
  task.y = parts.get();
  run_tiles(weight, tasks, count, kernels, parallel_for);
  kernels.add_parts(parts.get(), task.sum_parts, size, y);
}

// Parts of the sum. Few rows of A and B = S: the bytes of neighbouring rows of the stored matrix follow each other, so
// a part is read from one end to the other, as memory is fastest, where a range of outputs has pieces of every row.
// They do not depend on the number of threads, and so neither does the result.
size_t sum_parts_of(const Task& task) {
  const Layout& layout = *task.weight->layout;
  const bool whole = layout.trans_b || task.m > kFewRows || layout.rows < kSumParts * kRun || is_small(layout, task.m);
  return whole ? 1 : kSumParts;
}

// Outputs per tile: more where a tile is little work, but enough tiles must remain for the threads. Rows of the stored
// matrix, `rows` in all segments, are outputs with trans_b; else whole blocks of columns are.
size_t tile_outputs_of(const Task& task, size_t rows, const Kernels& kernels) {
  const Layout& layout = *task.weight->layout;
  const size_t m = task.m;
  if (task.weight->row_order) {
    const size_t wanted = std::min({kMostOrdered, kOrderedOutputs / m, rows / kRowTiles});
    return std::max(kLeastOrdered, wanted / RowOrder::kStep * RowOrder::kStep);
  }
  if (layout.trans_b) {
    if (m > kFewRows && !task.integers) return std::max(kLeastRows, 2 * kernels.vector_floats);
    return std::min(kMostRows, std::max(kLeastRows, rows / (kRowTiles * kLeastRows) * kLeastRows));
  }
  if (task.sum_parts > 1) return layout.columns;
  const size_t wanted = std::min(kMostColumns, std::max(kLeastColumns, layout.columns / kColumnTiles));
  return std::max(layout.block_size, wanted / layout.block_size * layout.block_size);
}

// Rows of A rounded to int8 in blocks, as the kernels want them.
class RoundedRows {
 public:
  RoundedRows(const Layout& layout, const float* a, size_t m, const Kernels& kernels, const ParallelFor& parallel_for)
      : m_(m), k_(layout.columns), block_size_(layout.block_size),
        stride_(round_up(layout.blocks, kernels.vector_floats)), codes_(m * k_), scales_(m * stride_),
        sums_(m * stride_) {
    std::fill_n(scales_.get(), m * stride_, 0.0f);
    std::fill_n(sums_.get(), m * stride_, 0.0f);
    for_each(m, m * k_, parallel_for, [&](size_t i) {
      for (size_t block = 0; block < layout.blocks; ++block) {
        const size_t place = i * stride_ + block;
        kernels.quantize_block(a + i * k_ + block * block_size_, block_size_,
                               codes_.get() + (block * m_ + i) * block_size_, scales_.get() + place,
                               sums_.get() + place);
      }
    });
  }

  void give(Task& task, const Kernels& kernels) {
    if (!task.integers) {
      task.a = floats();
      return;
    }
    task.codes = kernels.wants_offset(*task.weight->layout, m_) ? codes_plus_128() : codes_.get();
    task.scales = scales_.get();
    task.sums = sums_.get();
    task.block_stride = stride_;
  }

 private:
  const int8_t* codes_plus_128() {
    if (!offset_codes_) {
      offset_codes_.emplace(m_ * k_);
      std::transform(codes_.get(), codes_.get() + m_ * k_, offset_codes_->get(),
                     [](int8_t code) { return static_cast<int8_t>(code ^ -128); });
    }
    return offset_codes_->get();
  }

  // The rounded values, for kernels that cannot multiply integers.
  const float* floats() {
    if (!floats_) {
      floats_.emplace(m_ * k_);
      for (size_t i = 0; i < m_; ++i) {
        for (size_t j = 0; j < k_; ++j) {
          const size_t block = j / block_size_;
          const int8_t code = codes_.get()[(block * m_ + i) * block_size_ + j % block_size_];
          floats_->get()[i * k_ + j] = static_cast<float>(code) * scales_.get()[i * stride_ + block];
        }
      }
    }
    return floats_->get();
  }

  size_t m_, k_, block_size_, stride_;
  AlignedArray<int8_t> codes_;  // [blocks, m, block_size]
  AlignedArray<float> scales_, sums_;
  std::optional<AlignedArray<int8_t>> offset_codes_;
  std::optional<AlignedArray<float>> floats_;
};

void multiply(const Weight& weight, const float* a, size_t m, const float* bias, float* y, const Kernels& kernels,
              const ParallelFor& parallel_for) {
  const Layout& layout = *weight.layout;
  const std::vector<RowSegment>& segments = weight.index->row_segments;
  const size_t count = std::max<size_t>(1, segments.size());
  std::array<Weight, 4> weights;
  std::array<Task, 4> tasks;
  for (size_t i = 0; i < count; ++i) {
    size_t first = 0;
    weights[i] = weight;
    if (!segments.empty()) {
      first = segments[i].row_begin;
      weights[i].layout = &segments[i].layout;
      weights[i].index = &segments[i].index;
      weights[i].scales += segments[i].scales_begin;
    }
    Task& task = tasks[i];
    task.weight = &weights[i];
    task.m = m;
    task.a = a;
    task.bias = bias ? bias + first : nullptr;
    task.y = y + first;
    task.y_stride = layout.trans_b ? layout.rows : layout.columns;
    task.integers = layout.accuracy_level == 4 && kernels.supports_integers(*task.weight->layout, m);
    task.sum_parts = sum_parts_of(task);
    task.tile_outputs = tile_outputs_of(task, layout.rows, kernels);
  }
  std::optional<RoundedRows> rounded;
  if (layout.accuracy_level == 4 && layout.trans_b) {
    rounded.emplace(layout, a, m, kernels, parallel_for);
    for (size_t i = 0; i < count; ++i) rounded->give(tasks[i], kernels);
  }
  run(weight, tasks.data(), count, kernels, parallel_for);
}

// What brings a row of this magnitude into the range: 1 for most.
float lift_of(int32_t magnitude) {
  if (magnitude >= kLargest) return kDown;  // also of infinities and NaNs, which stay what they are
  return magnitude != 0 && magnitude < kSmallest ? kUp : 1.0f;
}

}  // namespace

void q_matmul(const Weight& weight, const float* a, size_t m, const float* bias, float* y, const Kernels& kernels,
              const ParallelFor& parallel_for) {
  if (m == 0) return;
  const Layout& layout = *weight.layout;
  const size_t k = layout.trans_b ? layout.columns : layout.rows, n = layout.trans_b ? layout.rows : layout.columns;
  std::vector<float> lifts(m);
  for_each(m, m * k, parallel_for, [&](size_t i) { lifts[i] = lift_of(kernels.largest_magnitude(a + i * k, k)); });
  std::vector<size_t> lifted;
  for (size_t i = 0; i < m; ++i) {
    if (lifts[i] != 1.0f) lifted.push_back(i);
  }
  if (lifted.size() < m) multiply(weight, a, m, bias, y, kernels, parallel_for);
  if (lifted.empty()) return;

  // Rare: these rows once more, by themselves, so that the others are what they are without them.
  const AlignedArray<float> values(lifted.size() * k), products(lifted.size() * n);
  for (size_t i = 0; i < lifted.size(); ++i) {
    const float lift = lifts[lifted[i]];
    std::transform(a + lifted[i] * k, a + (lifted[i] + 1) * k, values.get() + i * k,
                   [lift](float value) { return value * lift; });
  }
  multiply(weight, values.get(), lifted.size(), nullptr, products.get(), kernels, parallel_for);
  for (size_t i = 0; i < lifted.size(); ++i) {
    const float back = 1.0f / lifts[lifted[i]];
    for (size_t j = 0; j < n; ++j) {
      y[lifted[i] * n + j] = products.get()[i * n + j] * back + (bias ? bias[j] : 0.0f);
    }
  }
}

}  // namespace fips
