// The inner loops. This file is compiled once per instruction set, with FIPS_ISA naming it (generic, avx2, avx512)
// and the compiler flags allowing it. Nothing here may instantiate a template of the standard library: the linker
// could then pick the copy made for a better CPU than the one it runs on.

#include "kernels.h"

#include <cfloat>
#include <cmath>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "streams are read as little-endian words");

namespace fips {
namespace FIPS_ISA {
namespace {

// --- vectors ---------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr size_t kVectorBytes = 64;
constexpr size_t kOuterRows = 8;   // rows of A held in registers by the outer-product kernel
constexpr size_t kDotRows = 4;     // by the dot-product kernel
constexpr size_t kIntegerRows = 2; // by the integer kernel
#elif defined(__AVX2__)
constexpr size_t kVectorBytes = 32;
constexpr size_t kOuterRows = 6;
constexpr size_t kDotRows = 2;
constexpr size_t kIntegerRows = 1;
#else
constexpr size_t kVectorBytes = 16;
constexpr size_t kOuterRows = 4;
constexpr size_t kDotRows = 2;
#endif
constexpr size_t kLanes = kVectorBytes / sizeof(float);
constexpr size_t kDotOutputs = 4;                // outputs per step of the dot-product and integer kernels
constexpr size_t kOuterOutputs = 2 * kLanes;     // of the outer-product kernel
constexpr size_t kDepth = 1024;                  // wanted length of sums over columns between additions to Y
constexpr size_t kOuterDepth = 64;               // same over rows

typedef float Vector __attribute__((vector_size(kVectorBytes)));

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof v); }

inline float sum_lanes(Vector v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float lanes[kLanes];
  store(lanes, v);
  for (size_t half = kLanes / 2; half; half /= 2) {
    for (size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#endif
}

inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
inline size_t larger(size_t a, size_t b) { return a < b ? b : a; }
inline size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// --- decoding: 8 entries at a time in one 64-bit word, one byte each -----------------------------------------------

constexpr uint64_t kEveryByte = 0x0101010101010101u;

constexpr uint64_t low_bits(int bits) { return bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }

// 8 fields of `bits` bits → 8 bytes. Higher bits of `word` must be zero.
template <int bits>
inline uint64_t spread(uint64_t word) {
  if constexpr (bits < 8) {
    word = (word | word << (32 - 4 * bits)) & (low_bits(4 * bits) * 0x0000000100000001u);
    word = (word | word << (16 - 2 * bits)) & (low_bits(2 * bits) * 0x0001000100010001u);
    word = (word | word << (8 - bits)) & (low_bits(bits) * kEveryByte);
  }
  return word;
}

// 8 codes from whole bytes.
template <int bits>
inline uint64_t read_codes(const uint8_t* stream) {
  if constexpr (bits == 3) {
    return spread<3>(stream[0] | uint64_t{stream[1]} << 8 | uint64_t{stream[2]} << 16);
  } else {
    uint64_t word = 0;
    std::memcpy(&word, stream, bits);
    return spread<bits>(word);
  }
}

// Up to 8 codes from bit position `bit`; what lies beyond `end` reads as zero.
template <int bits>
inline uint64_t read_codes_at(const uint8_t* stream, uint64_t bit, const uint8_t* end) {
  const uint8_t* first = stream + bit / 8;
  uint64_t word = 0;
  if (end - first >= 8) {
    std::memcpy(&word, first, 8);
  } else if (first < end) {
    std::memcpy(&word, first, static_cast<size_t>(end - first));
  }
  return spread<bits>((word >> (bit % 8)) & low_bits(8 * bits));
}

// Bit i → byte i, 0x00 or 0xff.
inline uint64_t byte_mask(uint8_t bits) {
  const uint64_t single = (bits * kEveryByte) & 0x8040201008040201u;
  return (((single + 0x7f * kEveryByte) >> 7) & kEveryByte) * 0xff;
}

// The lowest bytes of `bytes`, in order, to the places where `mask` (of kept: its 8 bits) has bytes.
inline uint64_t deposit(uint64_t bytes, uint64_t mask, uint8_t kept) {
#if defined(__BMI2__)
  (void)kept;
  return _pdep_u64(bytes, mask);
#else
  (void)mask;
  uint64_t result = 0;
  for (unsigned rest = kept; rest; rest &= rest - 1) {
    result |= (bytes & 0xff) << (8 * __builtin_ctz(rest));
    bytes >>= 8;
  }
  return result;
#endif
}

inline void put(uint64_t codes, uint64_t mask, const Encoding& e, uint8_t* out, uint8_t* kept) {
  const uint64_t word = (((codes << e.shift) | e.ones) & mask) | (e.absent & ~mask);
  std::memcpy(out, &word, 8);
  if (kept) {
    const uint64_t ones = mask & kEveryByte;
    std::memcpy(kept, &ones, 8);
  }
}

template <int bits>
void decode_dense(const uint8_t* codes, size_t count, uint8_t* out) {
  size_t i = 0;
#if defined(__AVX512VBMI__)
  if constexpr (bits < 8) {
    // 64 codes at a time: each 64-bit lane gets the bytes of its 8 codes, then each byte its own shift.
    alignas(64) uint8_t source[64], shift[64];
    for (size_t j = 0; j < 64; ++j) {
      source[j] = static_cast<uint8_t>((j / 8 * bits + j % 8) & 63);
      shift[j] = static_cast<uint8_t>(j % 8 * bits);
    }
    const __m512i sources = _mm512_load_si512(source), shifts = _mm512_load_si512(shift);
    const __m512i lowest = _mm512_set1_epi8(static_cast<char>(low_bits(bits)));
    for (; i + 8 <= count / 8; i += 8) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(low_bits(8 * bits), codes + i * bits);
      const __m512i lanes = _mm512_permutexvar_epi8(sources, bytes);
      _mm512_storeu_si512(out + i * 8, _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, lanes), lowest));
    }
  }
#endif
  for (; i < count / 8; ++i) {
    const uint64_t word = read_codes<bits>(codes + i * bits);
    std::memcpy(out + i * 8, &word, 8);
  }
}

// `count` entries of n:m. 8 kept entries at a time fill 8 * of / keep entries.
template <int bits, int keep, int of>
void decode_n_of_m(const uint8_t* codes, const uint8_t* pattern, size_t count, const Encoding& e, uint8_t* out,
                   uint8_t* kept) {
  constexpr int kIndexBits = of == 8 ? 3 : 2;
  constexpr int kGroups = 8 / of;          // groups in a word of 8 entries
  constexpr int kWords = of / keep;        // words filled by 8 kept entries
  const size_t steps = count * keep / of / 8;
  for (size_t i = 0; i < steps; ++i) {
    uint64_t code = read_codes<bits>(codes + i * bits);
    uint64_t index = read_codes<kIndexBits>(pattern + i * kIndexBits);
    for (int word = 0; word < kWords; ++word) {
      uint64_t values = 0, mask = 0;
      for (int group = 0; group < kGroups; ++group) {
        for (int j = 0; j < keep; ++j) {
          const unsigned place = 8 * (static_cast<unsigned>(group * of) + static_cast<unsigned>(index & 7));
          values |= (code & 0xff) << place;
          mask |= uint64_t{0xff} << place;
          code >>= 8;
          index >>= 8;
        }
      }
      put(values, mask, e, out, kept);
      out += 8;
      if (kept) kept += 8;
    }
  }
}

// `count` entries of a bitmap whose first code is number `first_code` of the segment.
template <int bits>
void decode_bitmap(const uint8_t* codes, const uint8_t* codes_end, uint64_t first_code, const uint8_t* pattern,
                   size_t count, const Encoding& e, uint8_t* out, uint8_t* kept) {
  uint64_t bit = first_code * bits;
  for (size_t i = 0; i < count / 8; ++i) {
    const uint8_t present = pattern[i];
    const uint64_t mask = byte_mask(present);
    const uint64_t values = deposit(read_codes_at<bits>(codes, bit, codes_end), mask, present);
    put(values, mask, e, out + i * 8, kept ? kept + i * 8 : nullptr);
    bit += static_cast<uint64_t>(__builtin_popcount(present)) * bits;
  }
}

inline uint64_t count_bits(const uint8_t* bytes, size_t size) {
  uint64_t count = 0;
  size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    uint64_t word;
    std::memcpy(&word, bytes + i, 8);
    count += static_cast<uint64_t>(__builtin_popcountll(word));
  }
  for (; i < size; ++i) count += static_cast<uint64_t>(__builtin_popcount(bytes[i]));
  return count;
}

// Columns [begin, end) of a row, whole blocks within one segment → bytes (Encoding); `kept` (0 or 1) unless null.
template <int bits>
void decode_run(const Weight& w, const Segment& segment, const StreamIndex::SegmentStart& start, size_t row,
                size_t begin, size_t end, uint8_t* out, uint8_t* kept) {
  const Layout& layout = *w.layout;
  const size_t row_start = (row - segment.row_begin) * segment.columns();
  const size_t entry = row_start + (begin - segment.column_begin);
  const uint8_t* codes = w.codes + start.codes;
  const size_t count = end - begin;
  if (!layout.sparse()) {
    decode_dense<bits>(codes + entry / 8 * bits, count, out);
    return;
  }
  const uint8_t* pattern = w.pattern + start.pattern;
  if (layout.bitmap()) {
    const uint64_t first = start.codes_before[row - segment.row_begin] +
                           count_bits(pattern + row_start / 8, (entry - row_start) / 8);
    decode_bitmap<bits>(codes, w.codes + w.codes_size, first, pattern + entry / 8, count, segment.encoding, out, kept);
    return;
  }
  const size_t stored = entry / layout.of * layout.keep;
  const uint8_t* run_codes = codes + stored / 8 * bits;
  const uint8_t* run_pattern = pattern + stored / 8 * static_cast<size_t>(layout.index_bits());
  if (layout.of == 4) {
    if (layout.keep == 1) {
      decode_n_of_m<bits, 1, 4>(run_codes, run_pattern, count, segment.encoding, out, kept);
    } else {
      decode_n_of_m<bits, 2, 4>(run_codes, run_pattern, count, segment.encoding, out, kept);
    }
  } else if (layout.keep == 1) {
    decode_n_of_m<bits, 1, 8>(run_codes, run_pattern, count, segment.encoding, out, kept);
  } else {
    decode_n_of_m<bits, 2, 8>(run_codes, run_pattern, count, segment.encoding, out, kept);
  }
}

void decode_run(const Weight& w, size_t segment, size_t row, size_t begin, size_t end, uint8_t* out, uint8_t* kept) {
  const Segment& s = w.layout->segments[segment];
  const StreamIndex::SegmentStart& start = w.index->starts[segment];
  switch (s.bits) {
    case 8: return decode_run<8>(w, s, start, row, begin, end, out, kept);
    case 4: return decode_run<4>(w, s, start, row, begin, end, out, kept);
    case 3: return decode_run<3>(w, s, start, row, begin, end, out, kept);
    default: return decode_run<2>(w, s, start, row, begin, end, out, kept);
  }
}

inline float float_from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = half & 0x7fff;
  uint32_t bits = rest << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;  // moves the exponent's bias, and makes subnormal halves normal
  std::memcpy(&bits, &value, 4);
  if (rest >= 0x7c00) bits = 0x7f800000 | rest << 13;  // infinity, NaN
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Calls visit(segment, begin, end) for the parts of columns [begin, end) of a row that lie in one segment each.
template <typename Visit>
inline void for_each_run(const Layout& layout, size_t row, size_t begin, size_t end, Visit visit) {
  for (size_t i = 0; i < layout.segments.size(); ++i) {
    const Segment& s = layout.segments[i];
    const size_t from = larger(begin, s.column_begin), to = smaller(end, s.column_end);
    if (row >= s.row_begin && row < s.row_end && from < to) visit(i, from, to);
  }
}

// Columns [begin, end) of a row, whole blocks, as the floats they stand for. bytes, kept: room for end - begin.
void decode_floats(const Weight& w, size_t row, size_t begin, size_t end, uint8_t* bytes, uint8_t* kept, float* out) {
  const Layout& layout = *w.layout;
  uint8_t* mask = layout.needs_mask() ? kept : nullptr;
  const uint16_t* scales = w.scales + row * layout.blocks();
  for_each_run(layout, row, begin, end, [&](size_t segment, size_t from, size_t to) {
    const Encoding& e = layout.segments[segment].encoding;
    decode_run(w, segment, row, from, to, bytes, mask);
    for (size_t block = from; block < to; block += layout.block_size) {
      const float scale = float_from_half(scales[block / layout.block_size]) * e.unit;
      const uint8_t* in = bytes + (block - from);
      float* values = out + (block - begin);
      for (size_t i = 0; i < layout.block_size; ++i) {
        values[i] = (static_cast<float>(static_cast<int>(in[i])) - e.bias) * scale;
      }
      if (mask) {
        const uint8_t* stored = mask + (block - from);
        for (size_t i = 0; i < layout.block_size; ++i) values[i] = stored[i] ? values[i] : 0.0f;
      }
    }
  });
}

// --- B = S.T: a row of the stored matrix is one output ---------------------------------------------------------

// y[i][j] += dot(a[i], b[j]) over `depth` columns, a multiple of kLanes.
template <size_t rows>
void dot_kernel(const float* a, size_t a_stride, const float* b, size_t b_stride, size_t depth, size_t outputs,
                float* y, size_t y_stride) {
  Vector acc[rows][kDotOutputs] = {};
  for (size_t k = 0; k < depth; k += kLanes) {
    Vector weights[kDotOutputs];
    for (size_t j = 0; j < kDotOutputs; ++j) weights[j] = load(b + j * b_stride + k);
    for (size_t i = 0; i < rows; ++i) {
      const Vector x = load(a + i * a_stride + k);
      for (size_t j = 0; j < kDotOutputs; ++j) acc[i][j] += x * weights[j];
    }
  }
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < outputs; ++j) y[i * y_stride + j] += sum_lanes(acc[i][j]);
  }
}

size_t dot_depth(const Layout& layout) {
  const size_t depth = larger(layout.block_size, kDepth / layout.block_size * layout.block_size);
  return smaller(depth, layout.columns);
}

void dot_tile(const Task& task, size_t tile, float* weights, uint8_t* bytes, uint8_t* kept) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t n = layout.rows;
  const size_t first = tile * task.tile_outputs;
  const size_t outputs = smaller(task.tile_outputs, n - first);
  for (size_t i = 0; i < task.m; ++i) {
    for (size_t j = 0; j < outputs; ++j) task.y[i * n + first + j] = task.bias ? task.bias[first + j] : 0.0f;
  }
  const size_t depth = dot_depth(layout);
  const size_t stride = round_up(depth, kLanes);
  for (size_t begin = 0; begin < layout.columns; begin += depth) {
    const size_t end = smaller(begin + depth, layout.columns);
    const size_t padded = round_up(end - begin, kLanes);
    for (size_t j = 0; j < round_up(outputs, kDotOutputs); ++j) {
      float* row = weights + j * stride;
      size_t filled = 0;
      if (j < outputs) {
        decode_floats(w, first + j, begin, end, bytes, kept, row);
        filled = end - begin;
      }
      std::memset(row + filled, 0, (padded - filled) * sizeof(float));
    }
    const float* a = task.a + begin;
    for (size_t i = 0; i < task.m;) {
      const bool full = task.m - i >= kDotRows;
      for (size_t j = 0; j < outputs; j += kDotOutputs) {
        (full ? dot_kernel<kDotRows> : dot_kernel<1>)(a + i * task.a_stride, task.a_stride, weights + j * stride,
                                                      stride, padded, smaller(kDotOutputs, outputs - j),
                                                      task.y + i * n + first + j, n);
      }
      i += full ? kDotRows : 1;
    }
  }
}

// --- B = S: a row of the stored matrix is one step of the sum --------------------------------------------------

// y[i][j] += sum over k of a[i][k] * b[k][j], for kOuterOutputs outputs of which the first `outputs` exist.
template <size_t rows>
void outer_kernel(const float* a, size_t a_stride, const float* b, size_t b_stride, size_t depth, size_t outputs,
                  float* y, size_t y_stride) {
  Vector acc[rows][2] = {};
  for (size_t k = 0; k < depth; ++k) {
    const Vector left = load(b + k * b_stride), right = load(b + k * b_stride + kLanes);
    for (size_t i = 0; i < rows; ++i) {
      const float x = a[i * a_stride + k];
      acc[i][0] += x * left;
      acc[i][1] += x * right;
    }
  }
  for (size_t i = 0; i < rows; ++i) {
    float* out = y + i * y_stride;
    if (outputs == kOuterOutputs) {
      store(out, load(out) + acc[i][0]);
      store(out + kLanes, load(out + kLanes) + acc[i][1]);
    } else {
      float sums[kOuterOutputs];
      store(sums, acc[i][0]);
      store(sums + kLanes, acc[i][1]);
      for (size_t j = 0; j < outputs; ++j) out[j] += sums[j];
    }
  }
}

void outer_tile(const Task& task, size_t tile, float* weights, uint8_t* bytes, uint8_t* kept) {
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t n = layout.columns;
  const size_t first = tile * task.tile_outputs;
  const size_t outputs = smaller(task.tile_outputs, n - first);
  const size_t stride = round_up(task.tile_outputs, kOuterOutputs);
  for (size_t i = 0; i < task.m; ++i) {
    for (size_t j = 0; j < outputs; ++j) task.y[i * n + first + j] = task.bias ? task.bias[first + j] : 0.0f;
  }
  for (size_t begin = 0; begin < layout.rows; begin += kOuterDepth) {
    const size_t depth = smaller(kOuterDepth, layout.rows - begin);
    for (size_t k = 0; k < depth; ++k) {
      float* row = weights + k * stride;
      decode_floats(w, begin + k, first, first + outputs, bytes, kept, row);
      std::memset(row + outputs, 0, (stride - outputs) * sizeof(float));
    }
    const float* a = task.a + begin;
    for (size_t i = 0; i < task.m;) {
      const bool full = task.m - i >= kOuterRows;
      for (size_t j = 0; j < outputs; j += kOuterOutputs) {
        (full ? outer_kernel<kOuterRows> : outer_kernel<1>)(a + i * task.a_stride, task.a_stride, weights + j, stride,
                                                            depth, smaller(kOuterOutputs, outputs - j),
                                                            task.y + i * n + first + j, n);
      }
      i += full ? kOuterRows : 1;
    }
  }
}

// --- B = S.T with rounded activations: unsigned bytes times signed bytes ---------------------------------------

#if defined(__AVX2__)

inline __m256i multiply_add(__m256i acc, __m256i bytes, __m256i codes) {
#if defined(__AVX512VNNI__)
  return _mm256_dpbusd_epi32(acc, bytes, codes);
#else
  // Sums of two products fit in 16 bits because bytes stay below 32 (integers_supported).
  const __m256i pairs = _mm256_maddubs_epi16(bytes, codes);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

// How many bytes one step takes, and its operations.
struct Step32 {
  static constexpr size_t kBytes = 32;
  using Integers = __m256i;
  using Floats = __m256;
  static Integers zero() { return _mm256_setzero_si256(); }
  static Floats zero_floats() { return _mm256_setzero_ps(); }
  static Integers load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Integers multiply(Integers acc, Integers bytes, Integers codes) { return multiply_add(acc, bytes, codes); }
  static Floats scale(Floats acc, Integers sums, float scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(scale), acc);
  }
  static float sum(Floats v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
};

#if defined(__AVX512VNNI__)
struct Step64 {
  static constexpr size_t kBytes = 64;
  using Integers = __m512i;
  using Floats = __m512;
  static Integers zero() { return _mm512_setzero_si512(); }
  static Floats zero_floats() { return _mm512_setzero_ps(); }
  static Integers load(const void* p) { return _mm512_loadu_si512(p); }
  static Integers multiply(Integers acc, Integers bytes, Integers codes) {
    return _mm512_dpbusd_epi32(acc, bytes, codes);
  }
  static Floats scale(Floats acc, Integers sums, float scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(scale), acc);
  }
  static float sum(Floats v) { return _mm512_reduce_add_ps(v); }
};
#endif

// A group of kDotOutputs decoded rows: bytes [outputs][columns]; scales and offsets [outputs][blocks], where a
// block's dot product is scale * dot(bytes, codes) * activation scale + offset * activation sum.
struct DecodedRows {
  uint8_t* bytes;
  float* scales;
  float* offsets;
};

void decode_rows(const Weight& w, size_t first, size_t outputs, const DecodedRows& rows) {
  const Layout& layout = *w.layout;
  const size_t blocks = layout.blocks();
  for (size_t j = 0; j < kDotOutputs; ++j) {
    // Outputs past the end repeat the last row: computed, never stored.
    const size_t row = first + smaller(j, outputs - 1);
    uint8_t* bytes = rows.bytes + j * layout.columns;
    for_each_run(layout, row, 0, layout.columns, [&](size_t segment, size_t from, size_t to) {
      const Encoding& e = layout.segments[segment].encoding;
      decode_run(w, segment, row, from, to, bytes + from, nullptr);
      for (size_t block = from / layout.block_size; block < to / layout.block_size; ++block) {
        const float scale = float_from_half(w.scales[row * blocks + block]) * e.unit;
        rows.scales[j * blocks + block] = scale;
        rows.offsets[j * blocks + block] = -e.bias * scale;
      }
    });
  }
}

template <typename Step, size_t rows>
void integer_kernel(const Task& task, const DecodedRows& decoded, size_t i, size_t first, size_t outputs) {
  const Layout& layout = *task.weight->layout;
  const size_t columns = layout.columns, blocks = layout.blocks();
  typename Step::Floats acc[rows][kDotOutputs];
  for (size_t r = 0; r < rows; ++r) {
    for (size_t j = 0; j < kDotOutputs; ++j) acc[r][j] = Step::zero_floats();
  }
  for (size_t block = 0; block < blocks; ++block) {
    typename Step::Integers sums[rows][kDotOutputs];
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < kDotOutputs; ++j) sums[r][j] = Step::zero();
    }
    const size_t end = (block + 1) * layout.block_size;
    for (size_t k = block * layout.block_size; k < end; k += Step::kBytes) {
      typename Step::Integers codes[rows];
      for (size_t r = 0; r < rows; ++r) codes[r] = Step::load(task.codes + (i + r) * columns + k);
      for (size_t j = 0; j < kDotOutputs; ++j) {
        const typename Step::Integers bytes = Step::load(decoded.bytes + j * columns + k);
        for (size_t r = 0; r < rows; ++r) sums[r][j] = Step::multiply(sums[r][j], bytes, codes[r]);
      }
    }
    for (size_t r = 0; r < rows; ++r) {
      const float scale = task.scales[(i + r) * blocks + block];
      for (size_t j = 0; j < kDotOutputs; ++j) {
        acc[r][j] = Step::scale(acc[r][j], sums[r][j], scale * decoded.scales[j * blocks + block]);
      }
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    const float* sums = task.sums + (i + r) * blocks;
    for (size_t j = 0; j < outputs; ++j) {
      float offset = task.bias ? task.bias[first + j] : 0.0f;
      for (size_t block = 0; block < blocks; ++block) offset += sums[block] * decoded.offsets[j * blocks + block];
      task.y[(i + r) * layout.rows + first + j] = Step::sum(acc[r][j]) + offset;
    }
  }
}

template <typename Step>
void integer_tile(const Task& task, size_t tile, const DecodedRows& decoded) {
  const size_t n = task.weight->layout->rows;
  const size_t tile_end = smaller((tile + 1) * task.tile_outputs, n);
  for (size_t first = tile * task.tile_outputs; first < tile_end; first += kDotOutputs) {
    const size_t outputs = smaller(kDotOutputs, tile_end - first);
    decode_rows(*task.weight, first, outputs, decoded);
    for (size_t i = 0; i < task.m;) {
      const bool full = task.m - i >= kIntegerRows;
      (full ? integer_kernel<Step, kIntegerRows> : integer_kernel<Step, 1>)(task, decoded, i, first, outputs);
      i += full ? kIntegerRows : 1;
    }
  }
}

bool integers_supported(const Layout& layout) {
#if defined(__AVX512VNNI__)
  const bool bytes_fit = true;
#else
  const bool bytes_fit = layout.segments.front().bits < 8;
#endif
  // Sums of a block must stay within 32 bits: 255 * 127 * 65536 < 2^31.
  return bytes_fit && !layout.needs_mask() && layout.block_size % Step32::kBytes == 0 && layout.block_size <= 65536;
}

#else

bool integers_supported(const Layout&) { return false; }

#endif

// --- activations -----------------------------------------------------------------------------------------------

void quantize_row(const float* a, size_t columns, size_t block_size, int8_t* codes, float* scales, float* sums) {
  for (size_t begin = 0; begin < columns; begin += block_size) {
    const float* block = a + begin;
    float largest = 0.0f;
    bool finite = true;
    for (size_t i = 0; i < block_size; ++i) {
      const float magnitude = std::fabs(block[i]);
      finite &= magnitude <= FLT_MAX;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float scale = finite ? largest / 127.0f : NAN;
    const float divisor = scale > 0.0f ? scale : 1.0f;
    int sum = 0;
    for (size_t i = 0; i < block_size; ++i) {
      // Adding and taking away 1.5 * 2^23 rounds to an integer, half to even.
      const float rounded = finite ? (block[i] / divisor + 12582912.0f) - 12582912.0f : 0.0f;
      const int code = static_cast<int>(rounded);
      codes[begin + i] = static_cast<int8_t>(code);
      sum += code;
    }
    scales[begin / block_size] = scale;
    sums[begin / block_size] = scale * static_cast<float>(sum);
  }
}

// --- scratch memory --------------------------------------------------------------------------------------------

size_t scratch_bytes(const Task& task) {
  const Layout& layout = *task.weight->layout;
  if (task.codes) {
    return round_up(kDotOutputs * layout.columns, 64) + 2 * kDotOutputs * layout.blocks() * sizeof(float);
  }
  if (layout.trans_b) {
    const size_t depth = dot_depth(layout);
    return task.tile_outputs * round_up(depth, kLanes) * sizeof(float) + 2 * depth;
  }
  return kOuterDepth * round_up(task.tile_outputs, kOuterOutputs) * sizeof(float) + 2 * task.tile_outputs;
}

void run_tile(const Task& task, size_t tile, void* scratch) {
  const Layout& layout = *task.weight->layout;
  uint8_t* memory = static_cast<uint8_t*>(scratch);
#if defined(__AVX2__)
  if (task.codes) {
    float* floats = reinterpret_cast<float*>(memory + round_up(kDotOutputs * layout.columns, 64));
    const DecodedRows decoded{memory, floats, floats + kDotOutputs * layout.blocks()};
#if defined(__AVX512VNNI__)
    if (layout.block_size % Step64::kBytes == 0) return integer_tile<Step64>(task, tile, decoded);
#endif
    return integer_tile<Step32>(task, tile, decoded);
  }
#endif
  float* weights = static_cast<float*>(scratch);
  if (layout.trans_b) {
    const size_t depth = dot_depth(layout);
    uint8_t* bytes = memory + task.tile_outputs * round_up(depth, kLanes) * sizeof(float);
    dot_tile(task, tile, weights, bytes, bytes + depth);
  } else {
    uint8_t* bytes = memory + kOuterDepth * round_up(task.tile_outputs, kOuterOutputs) * sizeof(float);
    outer_tile(task, tile, weights, bytes, bytes + task.tile_outputs);
  }
}

#define FIPS_TEXT(name) #name
#define FIPS_NAME(name) FIPS_TEXT(name)

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {FIPS_NAME(FIPS_ISA), kLanes, integers_supported, scratch_bytes, run_tile, quantize_row};

}  // namespace FIPS_ISA
}  // namespace fips
