// Rounds the activations, cuts a product into tiles for the threads, and adds what the parts of a sum give.

#include "matmul.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "simd/integers.h"

namespace fips {
namespace {

constexpr size_t kAlignment = 64;
// Below this many multiplications waking other threads costs more than it gains.
constexpr size_t kSmallestParallelWork = 1 << 16;
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
  if (task.m * k < kSmallestParallelWork) {
    for (size_t i = 0; i < task.m; ++i) quantize(i);
  } else {
    parallel_for.run(
        parallel_for.context, task.m, [](void* data, size_t i) { (*static_cast<decltype(quantize)*>(data))(i); },
        const_cast<void*>(static_cast<const void*>(&quantize)));
  }
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

}  // namespace

void q_matmul(const Weight& weight, const float* a, size_t m, const float* bias, float* y, const Kernels& kernels,
              const ParallelFor& parallel_for) {
  if (m == 0) return;
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

}  // namespace fips
