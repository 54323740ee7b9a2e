// One row of rounded activations times a dense weight of 2, 3 and 4 bits with short rows, B = S.T: four stored rows at a
// time in vectors of 32 bytes, fields of bytes multiplied where they are. For CPUs with AVX-512 and VNNI.
#pragma once

#include "integer/chunk_halves.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)

#include "integer/dense_few_rows.h"
#include "integer/row_scales.h"

namespace fips {
namespace FIPS_ISA {
namespace {

// Two parts of 16 bytes, of which the second is `ahead` bytes after the first.
inline __m256i two_parts(const int8_t* p, size_t ahead) {
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(first),
                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + ahead)), 1);
}

// Products of kBytes bytes of a dense row, which are kColumns codes, with as many activations.
template <int bits>
struct FieldProducts {
  static constexpr bool kUsed = bits < 8;
  static constexpr size_t kColumns = bits == 2 ? 128 : 64, kBytes = kColumns / 8 * bits;
  static constexpr size_t kFields = bits == 2 ? 4 : 2;
  static constexpr int kShift = bits == 3 ? 2 : bits;  // by which sums in `upper` are too high

  static void load(const int8_t* a, __m256i (&fields)[kFields]) {
    for (size_t f = 0; f < kFields; ++f) {
      fields[f] = bits == 4 ? Vec32::load(a + 32 * f) : two_parts(a + 16 * f, bits == 2 ? 64 : 32);
    }
  }

  static void add(const uint8_t* bytes, const __m256i (&a)[kFields], __m256i& lower, __m256i& upper) {
    if constexpr (bits == 3) {
      __m256i levels[kHalves];
      HalfLevels<3>::read(bytes, levels);
      lower = _mm256_dpbusd_epi32(lower, levels[0], a[0]);
      upper = _mm256_dpbusd_epi32(upper, levels[1], a[1]);
      return;
    }
    const __m256i all = Vec32::load(bytes);
    const __m256i first = Vec32::fill((1 << bits) - 1), second = Vec32::fill(((1 << bits) - 1) << bits);
    lower = _mm256_dpbusd_epi32(lower, _mm256_and_si256(all, first), a[0]);
    upper = _mm256_dpbusd_epi32(upper, _mm256_and_si256(all, second), a[1]);
    if constexpr (bits == 2) {
      const __m256i rest = _mm256_srli_epi16(all, 4);
      lower = _mm256_dpbusd_epi32(lower, _mm256_and_si256(rest, first), a[2]);
      upper = _mm256_dpbusd_epi32(upper, _mm256_and_si256(rest, second), a[3]);
    }
  }
};

constexpr size_t kFieldOutputs = 4;

template <int bits>
inline bool fields_fit(const Layout& layout) {
  return FieldProducts<bits>::kUsed && layout.block_size % FieldProducts<bits>::kColumns == 0;
}

bool fields_supported(const Layout& layout, size_t m) {
  if (m != 1 || !dense_supported(layout, m)) return false;
  for (const Segment& segment : layout.segments) {
    bool fit = segment.row_bytes() <= kShortRow;
    with_bits(segment.bits, [&](auto width) { fit = fit && fields_fit<decltype(width)::kValue>(layout); });
    if (!fit) return false;
  }
  return true;
}

size_t fields_scratch_bytes(const Task& task) { return (1 + kFieldOutputs) * task.block_stride * sizeof(float); }

// Four stored rows, the next one `step` further; of none if one is computed four times.
struct Quad {
  size_t first, step;
};

// acc = what the offsets add. products [4][block_stride]: scales of A times those of the rows.
inline void begin_quad(const Task& task, Quad rows, const float* offsets, float* products,
                       __m256 (&acc)[kFieldOutputs]) {
  const Weight& w = *task.weight;
  const size_t blocks = w.layout->blocks;
  for (size_t j = 0; j < kFieldOutputs; ++j) acc[j] = Vec32::zero();
  for (size_t block = 0; block < blocks; block += Vec32::kLanes) {
    // No further than the row's end: a scale there need not be finite.
    const __mmask8 within = static_cast<__mmask8>((1u << smaller(blocks - block, Vec32::kLanes)) - 1);
    const __m256 offset = Vec32::load_floats(offsets + block), a_scale = Vec32::load_floats(task.scales + block);
    for (size_t j = 0; j < kFieldOutputs; ++j) {
      const uint16_t* halves = w.scales + (rows.first + j * rows.step) * blocks + block;
      const __m256 scale = _mm256_cvtph_ps(_mm_maskz_loadu_epi16(within, halves));
      acc[j] = Vec32::multiply_add(offset, scale, acc[j]);
      Vec32::store_floats(products + j * task.block_stride + block, Vec32::multiply(a_scale, scale));
    }
  }
}

// acc += the products of a segment's blocks. a, b, products: at its first block. b_step: from a row to the next. ahead: bytes
// that are read soon, in the order of memory. kVectors: of a block, if known at compile time, else 0.
template <int bits, size_t kVectors>
inline __attribute__((always_inline)) void fields_dot(const int8_t* a, const uint8_t* b, size_t b_step,
                                                      const uint8_t* ahead, const float* products, size_t stride,
                                                      size_t blocks, size_t block_size,
                                                      __m256 (&acc)[kFieldOutputs]) {
  using Fields = FieldProducts<bits>;
  const size_t vectors = kVectors ? kVectors : block_size / Fields::kColumns;
  for (size_t block = 0; block < blocks; ++block) {
    prefetch_lines(ahead, kFieldOutputs * vectors * Fields::kBytes, 0);
    ahead += kFieldOutputs * vectors * Fields::kBytes;
    __m256i lower[kFieldOutputs], upper[kFieldOutputs];
    for (size_t j = 0; j < kFieldOutputs; ++j) lower[j] = upper[j] = Vec32::zero_ints();
    for (size_t v = 0; v < vectors; ++v, a += Fields::kColumns, b += Fields::kBytes) {
      __m256i fields[Fields::kFields];
      Fields::load(a, fields);
#pragma GCC unroll 4
      for (size_t j = 0; j < kFieldOutputs; ++j) Fields::add(b + j * b_step, fields, lower[j], upper[j]);
    }
#pragma GCC unroll 4
    for (size_t j = 0; j < kFieldOutputs; ++j) {
      const __m256i total = _mm256_add_epi32(lower[j], _mm256_srai_epi32(upper[j], Fields::kShift));
      acc[j] = Vec32::multiply_add(Vec32::floats(total), Vec32::set(products[j * stride + block]), acc[j]);
    }
  }
}

// The sum of each vector's lanes.
inline __m128 sums_of(const __m256 (&v)[4]) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

void fields_tile(const Task& task, size_t tile, void* scratch) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t first = tile * task.tile_outputs, last = smaller(first + task.tile_outputs, layout.rows);
  float* offsets = static_cast<float*>(scratch);
  float* products = offsets + task.block_stride;
  for_each_row_range(layout, first, last, [&](size_t begin, size_t end) {
    write_offsets(task, begin, offsets);
    for (size_t row = begin, count; row < end; row += count) {
      count = end - row >= kFieldOutputs ? kFieldOutputs : 1;
      const Quad rows{row, count == kFieldOutputs ? size_t{1} : 0};
      __m256 acc[kFieldOutputs];
      begin_quad(task, rows, offsets, products, acc);
      for_each_part(layout, row, row + 1, 0, layout.columns, [&](const Part& part) {
        const Segment& segment = layout.segments[part.segment];
        const size_t row_bytes = segment.row_bytes(), block = part.begin / layout.block_size;
        const size_t blocks = (part.end - part.begin) / layout.block_size;
        const uint8_t* b = w.codes + w.index->starts[part.segment].codes + (row - segment.row_begin) * row_bytes;
        const uint8_t* ahead = b + larger(4096, kFieldOutputs * row_bytes);
        with_bits(segment.bits, [&](auto width) {
          constexpr int bits = decltype(width)::kValue;
          if constexpr (FieldProducts<bits>::kUsed) {
            const auto dot = [&](auto vectors) {
              fields_dot<bits, decltype(vectors)::kValue>(task.codes + part.begin, b, rows.step * row_bytes, ahead,
                                                          products + block, task.block_stride, blocks,
                                                          layout.block_size, acc);
            };
            if (layout.block_size == 2 * kChunk) {
              dot(Bits<2 * kChunk / FieldProducts<bits>::kColumns>{});
            } else {
              dot(Bits<0>{});
            }
          }
        });
      });
      __m128 sums = sums_of(acc);
      if (count == 1) {
        task.y[row] = _mm_cvtss_f32(sums) + (task.bias ? task.bias[row] : 0.0f);
        continue;
      }
      if (task.bias) sums = _mm_add_ps(sums, _mm_loadu_ps(task.bias + row));
      _mm_storeu_ps(task.y + row, sums);
    }
  });
}

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips

#endif
