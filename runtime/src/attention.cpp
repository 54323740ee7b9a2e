// Checks lengths and positions, appends keys and values to the caches, and cuts attention into tiles for the threads.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "memory.h"
#include "simd/integers.h"

namespace fips {
namespace {

// A tile of few queries, as of a new token, is one for all threads, and its time is that of reading keys and values: so
// these are cut into parts of at least so many, and at most so many parts. They do not depend on the number of threads,
// and so neither does the result.
constexpr size_t kPartKeys = 64, kMostParts = 16;

// Where the keys of new tokens begin.
size_t past_of(const Attention& a, size_t text) { return static_cast<size_t>(a.seqlens_k[text]) + 1 - a.tokens; }

void check(const Attention& a) {
  for (size_t text = 0; text < a.batch; ++text) {
    const int64_t total = int64_t{a.seqlens_k[text]} + 1, tokens = static_cast<int64_t>(a.tokens);
    if (total >= tokens && total - tokens <= static_cast<int64_t>(a.past_capacity) &&
        total <= static_cast<int64_t>(a.capacity)) {
      continue;
    }
    throw std::invalid_argument("seqlens_k has " + std::to_string(a.seqlens_k[text]) + ": with " +
                                std::to_string(tokens) + " new tokens that is no text for a past of " +
                                std::to_string(a.past_capacity) + " and a cache of " + std::to_string(a.capacity) +
                                " tokens");
  }
  const bool is_shared = a.past_key == a.present_key || a.past_value == a.present_value;
  if (is_shared && a.batch && a.past_capacity && a.past_capacity != a.capacity) {
    throw std::invalid_argument("past and present are the same memory, but for " + std::to_string(a.past_capacity) +
                                " and " + std::to_string(a.capacity) + " tokens");
  }
  for (size_t i = 0; i < a.batch * a.tokens; ++i) {
    if (a.position_ids[i] >= 0 && static_cast<uint64_t>(a.position_ids[i]) < a.table_rows) continue;
    throw std::invalid_argument("position_ids has " + std::to_string(a.position_ids[i]) + ", which is not one of the " +
                                std::to_string(a.table_rows) + " rows of cos_cache");
  }
}

// What was in the caches; zeros behind the new tokens.
void copy_past(const Attention& a, const float* past, float* present) {
  if (past == present) return;
  for (size_t i = 0; i < a.batch * a.kv_heads; ++i) {
    const size_t before = past_of(a, i / a.kv_heads), after = before + a.tokens;
    float* const to = present + i * a.capacity * a.head_size;
    std::copy_n(past + i * a.past_capacity * a.head_size, before * a.head_size, to);
    std::fill(to + after * a.head_size, to + a.capacity * a.head_size, 0.0f);
  }
}

// A token's queries to `queries` [batch, kv_heads, tokens, heads / kv_heads, head_size], its keys and values to the
// caches.
void prepare_token(const Attention& a, const Kernels& kernels, size_t index, float* queries) {
  const size_t text = index / a.tokens, token = index % a.tokens, size = a.head_size, group = a.heads / a.kv_heads;
  const size_t row = static_cast<size_t>(a.position_ids[index]) * (size / 2);
  const float* x = a.qkv + index * (a.heads + 2 * a.kv_heads) * size;
  const auto prepare = [&](const float* norm, float factor, float* out) {
    kernels.prepare_head(x, size, norm, a.epsilon, a.cosines + row, a.sines + row, factor, out);
    x += size;
  };
  for (size_t head = 0; head < a.heads; ++head) {
    const size_t place = ((text * a.kv_heads + head / group) * a.tokens + token) * group + head % group;
    prepare(a.q_norm, a.scale, queries + place * size);
  }
  const auto cached = [&](float* cache, size_t head) {
    return cache + ((text * a.kv_heads + head) * a.capacity + past_of(a, text) + token) * size;
  };
  for (size_t head = 0; head < a.kv_heads; ++head) prepare(a.k_norm, 1.0f, cached(a.present_key, head));
  for (size_t head = 0; head < a.kv_heads; ++head, x += size) std::copy_n(x, size, cached(a.present_value, head));
}

// The tiles of all texts and heads, each in `parts` parts.
class Tiles {
 public:
  Tiles(const Attention& a, const float* queries)
      : a_(a), queries_(queries), rows_(a.tokens * (a.heads / a.kv_heads)),
        tiles_((rows_ + kAttentionRows - 1) / kAttentionRows) {
    if (tiles_ > 1) return;
    size_t keys = 0;
    for (size_t text = 0; text < a.batch; ++text) {
      const AttentionTile whole = tile(text * a.kv_heads);
      keys = std::max(keys, whole.end - whole.begin);
    }
    parts_ = std::min(kMostParts, (keys + kPartKeys - 1) / kPartKeys);
    part_keys_ = round_up((keys + parts_ - 1) / parts_, kAttentionKeys);
  }

  // Floats that the sums of a tile take, or of a part of it.
  size_t sums_size() const { return most_rows() * (a_.head_size + 2); }
  AttentionSums sums_at(float* memory) const {
    float* const weights = memory + most_rows() * a_.head_size;
    return {memory, weights, weights + most_rows()};
  }

  size_t count() const { return a_.batch * a_.kv_heads * tiles_; }
  size_t parts() const { return parts_; }
  size_t head_of(size_t index) const { return index / tiles_; }  // of all texts

  // All keys that its rows attend to.
  AttentionTile tile(size_t index) const {
    const size_t head = head_of(index), text = head / a_.kv_heads, size = a_.head_size;
    const size_t first = index % tiles_ * kAttentionRows;
    AttentionTile result{};
    result.queries = queries_ + (head * rows_ + first) * size;
    result.rows = std::min(kAttentionRows, rows_ - first);
    result.head_size = size;
    result.keys = a_.present_key + head * a_.capacity * size;
    result.values = a_.present_value + head * a_.capacity * size;
    result.first_row = first;
    result.group = a_.heads / a_.kv_heads;
    result.past = past_of(a_, text);
    result.window = a_.window;
    result.begin = row_begin(result, 0);
    result.end = row_end(result, result.rows - 1);
    return result;
  }

  AttentionTile part(size_t index, size_t number) const {
    AttentionTile result = tile(index);
    if (parts_ == 1) return result;
    const size_t end = result.end;
    result.begin = std::min(result.begin + number * part_keys_, end);
    result.end = std::min(result.begin + part_keys_, end);
    return result;
  }

  // The outputs of a tile, from the sums of its parts.
  void write(size_t index, float* memory) const {
    const AttentionTile whole = tile(index);
    const size_t size = a_.head_size, head = head_of(index), text = head / a_.kv_heads;
    for (size_t r = 0; r < whole.rows; ++r) {
      const size_t row = whole.first_row + r, token = row / whole.group;
      const size_t query_head = head % a_.kv_heads * whole.group + row % whole.group;
      float* const y = a_.y + ((text * a_.tokens + token) * a_.heads + query_head) * size;
      const auto sums = [&](size_t part) {
        return sums_at(memory + part * sums_size());
      };
      float maximum = -std::numeric_limits<float>::infinity();
      for (size_t part = 0; part < parts_; ++part) maximum = std::max(maximum, sums(part).maxima[r]);
      float weight = 0.0f;
      for (size_t part = 0; part < parts_; ++part) {
        const AttentionSums own = sums(part);
        if (own.weights[r] == 0.0f) continue;
        weight += own.weights[r] * std::exp(own.maxima[r] - maximum);
      }
      std::fill_n(y, size, 0.0f);
      for (size_t part = 0; part < parts_; ++part) {
        const AttentionSums own = sums(part);
        if (own.weights[r] == 0.0f) continue;
        const float factor = std::exp(own.maxima[r] - maximum) / weight;
        for (size_t i = 0; i < size; ++i) y[i] += own.values[r * size + i] * factor;
      }
    }
  }

 private:
  size_t most_rows() const { return std::min(kAttentionRows, rows_); }

  const Attention& a_;
  const float* queries_;
  size_t rows_, tiles_, parts_ = 1, part_keys_ = 0;
};

}  // namespace

void cached_attention(const Attention& a, const Kernels& kernels, const ParallelFor& parallel_for) {
  check(a);
  copy_past(a, a.past_key, a.present_key);
  copy_past(a, a.past_value, a.present_value);
  if (a.batch == 0 || a.tokens == 0) return;
  const AlignedArray<float> queries(a.batch * a.tokens * a.heads * a.head_size);
  for_each(a.batch * a.tokens, a.batch * a.tokens * (a.heads + 2 * a.kv_heads) * a.head_size, parallel_for,
           [&](size_t index) { prepare_token(a, kernels, index, queries.get()); });

  const Tiles tiles(a, queries.get());
  const size_t parts = tiles.parts(), size = tiles.sums_size();
  size_t work = 0;
  for (size_t index = 0; index < tiles.count(); ++index) {
    const AttentionTile tile = tiles.tile(index);
    work += 2 * tile.rows * (tile.end - tile.begin) * a.head_size;
  }
  std::atomic<bool> out_of_memory{false};
  if (parts == 1) {
    for_each(tiles.count(), tiles.count() == 1 ? 0 : work, parallel_for, [&](size_t index) {
      auto* const memory = static_cast<float*>(thread_scratch((size + kAttentionScores) * sizeof(float)));
      if (!memory) {
        out_of_memory = true;
        return;
      }
      kernels.attend(tiles.part(index, 0), tiles.sums_at(memory), memory + size);
      tiles.write(index, memory);
    });
  } else {
    const AlignedArray<float> sums(tiles.count() * parts * size);
    for_each(tiles.count() * parts, work, parallel_for, [&](size_t i) {
      auto* const scores = static_cast<float*>(thread_scratch(kAttentionScores * sizeof(float)));
      if (!scores) {
        out_of_memory = true;
        return;
      }
      kernels.attend(tiles.part(i / parts, i % parts), tiles.sums_at(sums.get() + i * size), scores);
    });
    if (!out_of_memory) {
      for (size_t index = 0; index < tiles.count(); ++index) tiles.write(index, sums.get() + index * parts * size);
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace fips
