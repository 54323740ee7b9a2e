// Brings activations into a range, rounds them, cuts a product into tiles for the threads, and adds what the parts of a
// sum give.

#include "matmul.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "simd/integers.h"

namespace fips {
namespace {

constexpr size_t kAlignment = 64;
// Below this many multiplications waking other threads costs more than it gains.
constexpr size_t kSmallestParallelWork = 1 << 16;
// Magnitudes of activations that are multiplied as they are, as bits of floats: scales and levels (up to 2^16 and 2^8)
// and sums of up to 2^31 terms neither overflow then nor become subnormal. A row of others, 0 aside, is brought there.
constexpr int32_t kSmallest = (127 - 64) << 23, kLargest = (127 + 64) << 23;
constexpr float kUp = 0x1p64f, kDown = 0x1p-64f;
// How many parts a sum is cut into.
constexpr size_t kSumParts = 8;
// What a tile has of stored rows at least and at most, and into how many tiles they are cut between that.
constexpr size_t kLeastRows = 16, kMostRows = 64, kRowTiles = 16;
// The same of columns.
constexpr size_t kLeastColumns = 64, kMostColumns = 256, kColumnTiles = 8;

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(kAlignment)); }
};

template <typename T>
class AlignedArray {
 public:
  explicit AlignedArray(size_t size)
      : memory_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(kAlignment)))) {}
  T* get() const { return memory_.get(); }

 private:
  std::unique_ptr<T, AlignedDelete> memory_;
};

// A thread's working memory, kept between calls; null if there is no memory.
void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<void, AlignedDelete> scratch;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    capacity = 0;
    scratch.reset(::operator new(bytes, std::align_val_t(kAlignment), std::nothrow));
    if (!scratch) return nullptr;
    capacity = bytes;
  }
  return scratch.get();
}

struct Job {
  const Task* task;
  const Kernels* kernels;
  size_t scratch_bytes;
  std::atomic<bool> out_of_memory{false};
};

void run_tile(void* data, size_t tile) {
  Job& job = *static_cast<Job*>(data);
  void* scratch = thread_scratch(job.scratch_bytes);
  if (!scratch) {
    job.out_of_memory = true;
    return;
  }
  job.kernels->tile(*job.task, tile, scratch);
}

bool is_small(const Task& task) {
  return task.weight->layout->rows * task.weight->layout->columns * task.m < kSmallestParallelWork;
}

void run_tiles(const Task& task, const Kernels& kernels, const ParallelFor& parallel_for) {
  const size_t tiles = task.sum_parts > 1 ? task.sum_parts : (task.n() + task.tile_outputs - 1) / task.tile_outputs;
  Job job{&task, &kernels, kernels.scratch_bytes(task)};
  if (tiles == 1 || is_small(task)) {
    for (size_t tile = 0; tile < tiles; ++tile) run_tile(&job, tile);
  } else {
    parallel_for.run(parallel_for.context, tiles, run_tile, &job);
  }
  if (job.out_of_memory) throw std::bad_alloc();
}

void run(Task task, const Kernels& kernels, const ParallelFor& parallel_for) {
  if (task.sum_parts == 1) return run_tiles(task, kernels, parallel_for);
  const size_t size = task.m * task.n();
  const AlignedArray<float> parts(task.sum_parts * size);
  float* const y = task.y;
  task.y = parts.get();
  run_tiles(task, kernels, parallel_for);
  kernels.add_parts(parts.get(), task.sum_parts, size, y);
}

// Parts of the sum. Few rows of A and B = S: the bytes of neighbouring rows of the stored matrix follow each other, so
// a part is read from one end to the other, as memory is fastest, where a range of outputs has pieces of every row.
// They do not depend on the number of threads, and so neither does the result.
size_t sum_parts_of(const Task& task) {
  const Layout& layout = *task.weight->layout;
  return layout.trans_b || task.m > kFewRows || layout.rows < kSumParts * kRun || is_small(task) ? 1 : kSumParts;
}

// Outputs per tile: more where a tile is little work, but enough tiles must remain for the threads. Rows of the stored
// matrix are outputs with trans_b; else whole blocks of columns are.
size_t tile_outputs_of(const Task& task, const Kernels& kernels) {
  const Layout& layout = *task.weight->layout;
  const size_t m = task.m;
  if (layout.trans_b) {
    if (m > kFewRows && !task.integers) return std::max(kLeastRows, 2 * kernels.vector_floats);
    return std::min(kMostRows, std::max(kLeastRows, layout.rows / (kRowTiles * kLeastRows) * kLeastRows));
  }
  if (task.sum_parts > 1) return layout.columns;
  const size_t wanted = std::min(kMostColumns, std::max(kLeastColumns, layout.columns / kColumnTiles));
  return std::max(layout.block_size, wanted / layout.block_size * layout.block_size);
}

// Calls body(i) for every i below `count`, on several threads if that much `work` is worth it.
template <typename Body>
void for_each_row(size_t count, size_t work, const ParallelFor& parallel_for, Body body) {
  if (work < kSmallestParallelWork) {
    for (size_t i = 0; i < count; ++i) body(i);
    return;
  }
  parallel_for.run(
      parallel_for.context, count, [](void* data, size_t i) { (*static_cast<Body*>(data))(i); }, &body);
}

// Activations rounded to int8 in blocks. Kernels that cannot multiply integers get the rounded values as floats.
void rounded_matmul(Task& task, const Kernels& kernels, const ParallelFor& parallel_for) {
  const Layout& layout = *task.weight->layout;
  const size_t k = task.k();
  const size_t stride = round_up(layout.blocks, kernels.vector_floats);
  const AlignedArray<int8_t> codes(task.m * k);
  const AlignedArray<float> scales(task.m * stride), sums(task.m * stride);
  std::fill_n(scales.get(), task.m * stride, 0.0f);
  std::fill_n(sums.get(), task.m * stride, 0.0f);
  const bool offset = task.integers && kernels.wants_offset(layout, task.m);
  const auto quantize = [&](size_t i) {
    for (size_t block = 0; block < layout.blocks; ++block) {
      const size_t size = layout.block_size, place = i * stride + block;
      int8_t* out = codes.get() + (block * task.m + i) * size;
      kernels.quantize_block(task.a + i * k + block * size, size, out, scales.get() + place, sums.get() + place);
      if (offset) std::transform(out, out + size, out, [](int8_t code) { return static_cast<int8_t>(code ^ -128); });
    }
  };
  for_each_row(task.m, task.m * k, parallel_for, quantize);
  if (task.integers) {
    task.codes = codes.get();
    task.scales = scales.get();
    task.sums = sums.get();
    task.block_stride = stride;
    run(task, kernels, parallel_for);
    return;
  }
  const AlignedArray<float> rounded(task.m * k);
  for (size_t i = 0; i < task.m; ++i) {
    for (size_t j = 0; j < k; ++j) {
      const size_t block = j / layout.block_size;
      const int8_t code = codes.get()[(block * task.m + i) * layout.block_size + j % layout.block_size];
      rounded.get()[i * k + j] = static_cast<float>(code) * scales.get()[i * stride + block];
    }
  }
  task.a = rounded.get();
  run(task, kernels, parallel_for);
}

void multiply(const Weight& weight, const float* a, size_t m, const float* bias, float* y, const Kernels& kernels,
              const ParallelFor& parallel_for) {
  const Layout& layout = *weight.layout;
  Task task;
  task.weight = &weight;
  task.m = m;
  task.a = a;
  task.bias = bias;
  task.y = y;
  task.integers = layout.accuracy_level == 4 && kernels.supports_integers(layout, m);
  task.sum_parts = sum_parts_of(task);
  task.tile_outputs = tile_outputs_of(task, kernels);
  if (layout.accuracy_level == 4 && layout.trans_b) {
    rounded_matmul(task, kernels, parallel_for);
  } else {
    run(task, kernels, parallel_for);
  }
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
  for_each_row(m, m * k, parallel_for, [&](size_t i) { lifts[i] = lift_of(kernels.largest_magnitude(a + i * k, k)); });
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
