// Attention of new tokens to those before them, independent of ONNX Runtime.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "parallel_for.h"

namespace fips {

struct Attention {
  size_t batch, tokens;            // texts, and the new tokens of each
  size_t heads, kv_heads;          // of queries, and of keys and of values, which divides it
  size_t head_size;                // a multiple of kHeadStep
  size_t past_capacity, capacity;  // tokens that the caches have room for, before and after
  size_t table_rows;
  size_t window;                   // how many tokens one attends to at most, itself the last of them; 0: all
  float scale, epsilon;

  const float* qkv;            // [batch, tokens, (heads + 2 kv_heads) * head_size]: queries, keys, values
  const float* past_key;       // [batch, kv_heads, past_capacity, head_size]; so are past values
  const float* past_value;
  const int32_t* seqlens_k;    // [batch]: tokens of each text with the new ones, less one
  const int64_t* position_ids; // [batch, tokens]: rows of the tables
  const float* cosines;        // [table_rows, head_size / 2]; so are sines
  const float* sines;
  const float* q_norm;         // [head_size]; so is k_norm; null: no norms
  const float* k_norm;
  float* y;                    // [batch, tokens, heads * head_size]
  float* present_key;          // [batch, kv_heads, capacity, head_size], may be the past itself; so may present values
  float* present_value;
};

// Throws std::invalid_argument for texts that do not fit into the caches and positions that the tables do not have,
// std::bad_alloc.
void cached_attention(const Attention& attention, const Kernels& kernels, const ParallelFor& parallel_for);

}  // namespace fips
