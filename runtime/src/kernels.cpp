// The inner loops. This file is compiled once per instruction set, with FIPS_ISA naming it (generic, avx2, avx512)
// and the compiler flags allowing it. Nothing here may instantiate a template of the standard library: the linker
// could then pick the copy made for a better CPU than the one it runs on.

#include "kernels.h"

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
constexpr size_t kDirectRows = 4;      // up to which weights are not decoded to a buffer of floats
constexpr size_t kDirectDotRows = 2;   // of them in registers
constexpr size_t kDirectOuterRows = 4;
#elif defined(__AVX2__)
constexpr size_t kVectorBytes = 32;
constexpr size_t kOuterRows = 6;
constexpr size_t kDotRows = 2;
constexpr size_t kIntegerRows = 1;
constexpr size_t kDirectRows = 4;
constexpr size_t kDirectDotRows = 1;
constexpr size_t kDirectOuterRows = 2;
#else
constexpr size_t kVectorBytes = 16;
constexpr size_t kOuterRows = 4;
constexpr size_t kDotRows = 2;
constexpr size_t kIntegerRows = 0;
constexpr size_t kDirectRows = 0;  // without instructions from bytes to floats the buffer is faster
constexpr size_t kDirectDotRows = 1;
constexpr size_t kDirectOuterRows = 2;
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

// Asks for memory that is read soon; it may lie past the end of the stream.
inline void prefetch(const uint8_t* p) {
  constexpr uintptr_t kAhead = 2048;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + kAhead));
}

// --- decoding to one byte per entry ------------------------------------------------------------------------------

constexpr uint64_t kEveryByte = 0x0101010101010101u;

constexpr uint64_t low_bits(size_t bits) { return bits >= 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }

// 8 fields of `bits` bits → 8 bytes. Higher bits of `word` are ignored.
template <int bits>
inline uint64_t spread(uint64_t word) {
#if defined(__BMI2__)
  return _pdep_u64(word, low_bits(bits) * kEveryByte);
#else
  if constexpr (bits < 8) {
    static_assert(bits <= 4, "fields would overlap");
    word &= low_bits(8 * bits);
    word = (word | word << (32 - 4 * bits)) & (low_bits(4 * bits) * 0x0000000100000001u);
    word = (word | word << (16 - 2 * bits)) & (low_bits(2 * bits) * 0x0001000100010001u);
    word = (word | word << (8 - bits)) & (low_bits(bits) * kEveryByte);
  }
  return word;
#endif
}

// Up to 8 bytes; those from `end` on read as zero.
inline uint64_t read_word(const uint8_t* p, const uint8_t* end) {
  uint64_t word = 0;
  if (end - p >= 8) {
    std::memcpy(&word, p, 8);
  } else {
    for (int i = 0; p + i < end; ++i) word |= uint64_t{p[i]} << (8 * i);
  }
  return word;
}

// How the entries of 64 columns are stored: `keep` of every `of`, 0 of 0 if dense, 1 of 1 by a bitmap.
template <int keep, int of>
struct Pattern {
  static constexpr int kIndexBits = of == 8 ? 3 : of == 4 ? 2 : 1;
  static constexpr size_t kBytes = keep == 0 ? 0 : of == 1 ? 8 : 64 / of * keep * kIndexBits / 8;
};

#if defined(__AVX512VBMI2__)

constexpr uint64_t kEveryNibble = 0x1111111111111111u;

// Fields of 4 or 8 bits with one bit set each: number `index` of the field. first: bit 0 of every field.
template <int width>
inline uint64_t one_hot(uint64_t index) {
  constexpr uint64_t first = width == 8 ? kEveryByte : kEveryNibble;
  uint64_t result = first;
  for (int bit = 0; (1 << bit) < width; ++bit) {
    const uint64_t moved = ((index >> bit) & first) * low_bits(width);
    result = (result & ~moved) | ((result << (1 << bit)) & moved);
  }
  return result;
}

// The pattern's bytes of 64 entries → a bit per entry, 1 = kept.
template <int keep, int of>
inline uint64_t kept_bits(uint64_t stored) {
  if constexpr (of == 1) {
    return stored;
  } else if constexpr (of == 8) {
    const uint64_t index = spread<3 * keep>(stored);
    return keep == 2 ? one_hot<8>(index) | one_hot<8>(index >> 3) : one_hot<8>(index);
  } else if constexpr (keep == 2) {
    return one_hot<4>(stored) | one_hot<4>(stored >> 2);
  } else {
    const uint64_t bytes = spread<4>(stored);
    return one_hot<4>((bytes | bytes << 2) & (3 * kEveryNibble));
  }
}

// Spreads 64 codes at a time: each 64-bit lane gets the bytes of its 8 codes, then each byte its own shift.
template <int bits>
struct Spread64 {
  struct Table {
    constexpr Table() : source(), shift() {
      for (size_t j = 0; j < 64; ++j) {
        source[j] = static_cast<uint8_t>((j / 8 * bits + j % 8) & 63);
        shift[j] = static_cast<uint8_t>(j % 8 * bits);
      }
    }
    alignas(64) uint8_t source[64];
    alignas(64) uint8_t shift[64];
  };
  static constexpr Table kTable{};

  const __m512i sources = _mm512_load_si512(kTable.source);
  const __m512i shifts = _mm512_load_si512(kTable.shift);

  // Codes from bit `offset` of `bytes`, in bits `place` and up of the bytes; other bits are undefined.
  __m512i operator()(__m512i bytes, int offset, int place) const {
    const __m512i shift = _mm512_add_epi8(shifts, _mm512_set1_epi8(static_cast<char>(offset - place)));
    return _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(sources, bytes));
  }
};

template <int bits>
void decode_dense(const uint8_t* codes, size_t count, uint8_t* out) {
  const Spread64<bits> spread64;
  const __m512i lowest = _mm512_set1_epi8(static_cast<char>(low_bits(bits)));
  const auto step = [&](size_t size) {
    prefetch(codes);
    const __m512i bytes = _mm512_maskz_loadu_epi8(low_bits(size / 8 * bits), codes);
    _mm512_mask_storeu_epi8(out, low_bits(size), _mm512_and_si512(spread64(bytes, 0, 0), lowest));
  };
  for (; count >= 64; count -= 64, codes += 8 * bits, out += 64) step(64);
  if (count) step(count);
}

// `count` entries, the first code of which is number `first_code` of the stream. `kept` (0 or 1) unless null.
template <int bits, int keep, int of>
void decode_sparse(const uint8_t* codes, const uint8_t* codes_end, uint64_t first_code, const uint8_t* pattern,
                   size_t count, const Encoding& e, uint8_t* out, uint8_t* kept) {
  constexpr size_t kPatternBytes = Pattern<keep, of>::kBytes;
  uint64_t bit = first_code * bits;
  const Spread64<bits> spread64;
  const __m512i absent = _mm512_set1_epi64(static_cast<long long>(e.absent));
  const __m512i ones = _mm512_set1_epi64(static_cast<long long>(e.ones));
  const __m512i code_bits = _mm512_set1_epi8(static_cast<char>(low_bits(bits) << e.shift));
  for (size_t i = 0; i < count; i += 64) {
    const size_t size = smaller(64, count - i);
    uint64_t stored = 0;
    if (size == 64) {
      std::memcpy(&stored, pattern, kPatternBytes);
    } else {
      stored = read_word(pattern, pattern + size * kPatternBytes / 64);
    }
    prefetch(pattern);
    pattern += kPatternBytes;
    const uint64_t present = kept_bits<keep, of>(stored) & low_bits(size);
    const uint8_t* first = codes + bit / 8;
    prefetch(first);
    const size_t bytes_left = static_cast<size_t>(codes_end - first);
    const __m512i bytes =
        bytes_left >= 64 ? _mm512_loadu_si512(first) : _mm512_maskz_loadu_epi8(low_bits(bytes_left), first);
    const __m512i values = _mm512_or_si512(
        _mm512_and_si512(spread64(bytes, static_cast<int>(bit % 8), e.shift), code_bits), ones);
    _mm512_mask_storeu_epi8(out + i, low_bits(size), _mm512_mask_expand_epi8(absent, present, values));
    if (kept) _mm512_mask_storeu_epi8(kept + i, low_bits(size), _mm512_maskz_set1_epi8(present, 1));
    bit += static_cast<uint64_t>(__builtin_popcountll(present)) * bits;
  }
}

#else

template <int bits>
void decode_dense(const uint8_t* codes, size_t count, uint8_t* out) {
  const uint8_t* end = codes + count / 8 * bits;
  for (size_t i = 0; i < count / 8; ++i) {
    const uint64_t word = spread<bits>(read_word(codes + i * bits, end));
    std::memcpy(out + i * 8, &word, 8);
  }
}

// Bit i → byte i, 0x00 or 0xff.
inline uint64_t byte_mask(uint8_t bits) {
  const uint64_t single = (bits * kEveryByte) & 0x8040201008040201u;
  return (((single + 0x7f * kEveryByte) >> 7) & kEveryByte) * 0xff;
}

// The lowest codes of `word`, in order, to the bytes that are kept.
template <int bits>
inline uint64_t deposit(uint64_t word, uint8_t kept, uint64_t mask) {
#if defined(__BMI2__)
  (void)kept;
  return _pdep_u64(word, mask & (low_bits(bits) * kEveryByte));
#else
  (void)mask;
  uint64_t result = 0;
  for (unsigned rest = kept; rest; rest &= rest - 1) {
    result |= (word & low_bits(bits)) << (8 * __builtin_ctz(rest));
    word >>= bits;
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

// `count` entries, the first code of which is number `first_code` of the stream. `kept` (0 or 1) unless null.
template <int bits, int keep, int of>
void decode_sparse(const uint8_t* codes, const uint8_t* codes_end, uint64_t first_code, const uint8_t* pattern,
                   size_t count, const Encoding& e, uint8_t* out, uint8_t* kept) {
  uint64_t bit = first_code * bits;
  if constexpr (of == 1) {
    for (size_t i = 0; i < count; i += 8) {
      const uint8_t present = *pattern++;
      const uint64_t mask = byte_mask(present);
      const uint64_t values = deposit<bits>(read_word(codes + bit / 8, codes_end) >> (bit % 8), present, mask);
      put(values, mask, e, out + i, kept ? kept + i : nullptr);
      bit += static_cast<uint64_t>(__builtin_popcount(present)) * bits;
    }
  } else {
    constexpr int kIndexBits = Pattern<keep, of>::kIndexBits;
    constexpr int kGroups = 8 / of;  // groups in a word of 8 entries
    codes += bit / 8;
    const uint8_t* pattern_end = pattern + count * Pattern<keep, of>::kBytes / 64;
    for (size_t i = 0; i < count;) {  // 8 codes at a time
      uint64_t code = spread<bits>(read_word(codes, codes_end));
      uint64_t index = spread<kIndexBits>(read_word(pattern, pattern_end));
      codes += bits;
      pattern += kIndexBits;
      for (int word = 0; word < of / keep; ++word, i += 8) {
        uint64_t values = 0, mask = 0;
        for (int j = 0; j < kGroups * keep; ++j) {
          const unsigned place = 8 * (static_cast<unsigned>(j / keep * of) + static_cast<unsigned>(index & 7));
          values |= (code & 0xff) << place;
          mask |= uint64_t{0xff} << place;
          code >>= 8;
          index >>= 8;
        }
        put(values, mask, e, out + i, kept ? kept + i : nullptr);
      }
    }
  }
}

#endif

inline uint64_t count_bits(const uint8_t* bytes, size_t size) {
  uint64_t count = 0;
  for (size_t i = 0; i < size; i += 8) {
    count += static_cast<uint64_t>(__builtin_popcountll(read_word(bytes + i, bytes + size)));
  }
  return count;
}

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

template <int bits, int keep, int of>
void decode_part(const Weight& w, const Part& part, uint8_t* out, size_t stride, uint8_t* kept) {
  const Segment& segment = w.layout->segments[part.segment];
  const StreamIndex::SegmentStart& start = w.index->starts[part.segment];
  const size_t count = part.end - part.begin;
  for (size_t row = part.row_begin; row < part.row_end; ++row, out += stride) {
    const size_t row_start = (row - segment.row_begin) * segment.columns();
    const size_t entry = row_start + (part.begin - segment.column_begin);
    const uint8_t* codes = w.codes + start.codes;
    if constexpr (keep == 0) {
      decode_dense<bits>(codes + entry / 8 * bits, count, out);
    } else {
      const uint8_t* pattern = w.pattern + start.pattern;
      uint64_t first = entry / of * keep;
      if constexpr (of == 1) {
        first = start.codes_before[row - segment.row_begin] +
                count_bits(pattern + row_start / 8, (entry - row_start) / 8);
      }
      decode_sparse<bits, keep, of>(codes, w.codes + w.codes_size, first,
                                    pattern + entry / 8 * Pattern<keep, of>::kBytes / 8, count, segment.encoding, out,
                                    kept);
    }
  }
}

template <int bits>
void decode_part(const Weight& w, const Part& part, uint8_t* out, size_t stride, uint8_t* kept) {
  switch (w.layout->keep * 16 + w.layout->of) {
    case 0x00: return decode_part<bits, 0, 0>(w, part, out, stride, kept);
    case 0x11: return decode_part<bits, 1, 1>(w, part, out, stride, kept);
    case 0x14: return decode_part<bits, 1, 4>(w, part, out, stride, kept);
    case 0x18: return decode_part<bits, 1, 8>(w, part, out, stride, kept);
    case 0x24: return decode_part<bits, 2, 4>(w, part, out, stride, kept);
    default: return decode_part<bits, 2, 8>(w, part, out, stride, kept);
  }
}

// Bytes (Encoding) of a part, a row every `stride` bytes; `kept` (0 or 1, of one row) unless null.
void decode(const Weight& w, const Part& part, uint8_t* out, size_t stride, uint8_t* kept) {
  switch (w.layout->segments[part.segment].bits) {
    case 8: return decode_part<8>(w, part, out, stride, kept);
    case 4: return decode_part<4>(w, part, out, stride, kept);
    case 3: return decode_part<3>(w, part, out, stride, kept);
    default: return decode_part<2>(w, part, out, stride, kept);
  }
}

inline float float_from_half(uint16_t half) {
#if defined(__F16C__)
  return _cvtsh_ss(half);
#else
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
#endif
}

// The first `count` halves as floats, then zeros.
inline Vector floats_from_halves(const uint16_t* halves, size_t count) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>(low_bits(smaller(count, 16)));
  return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, halves)));
#else
  Vector floats = {};
  for (size_t i = 0; i < smaller(count, kLanes); ++i) floats[i] = float_from_half(halves[i]);
  return floats;
#endif
}

// Columns [begin, end) of a row, whole blocks, as the floats they stand for. bytes, kept: room for end - begin.
void decode_floats(const Weight& w, size_t row, size_t begin, size_t end, uint8_t* bytes, uint8_t* kept, float* out) {
  const Layout& layout = *w.layout;
  uint8_t* mask = layout.needs_mask() ? kept : nullptr;
  const uint16_t* scales = w.scales + row * layout.blocks();
  for_each_part(layout, row, row + 1, begin, end, [&](const Part& part) {
    const Encoding& e = layout.segments[part.segment].encoding;
    decode(w, part, bytes, 0, mask);
    for (size_t block = part.begin; block < part.end; block += layout.block_size) {
      const float scale = float_from_half(scales[block / layout.block_size]) * e.unit;
      const uint8_t* in = bytes + (block - part.begin);
      float* values = out + (block - begin);
      for (size_t i = 0; i < layout.block_size; ++i) {
        values[i] = (static_cast<float>(static_cast<int>(in[i])) - e.bias) * scale;
      }
      if (mask) {
        const uint8_t* stored = mask + (block - part.begin);
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

// --- few rows of activations: decoded bytes are multiplied without a buffer of floats -------------------------------

inline Vector floats_from_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector>(
      _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector>(
      _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))));
#else
  Vector v;
  for (size_t i = 0; i < kLanes; ++i) v[i] = static_cast<float>(static_cast<int>(p[i]));
  return v;
#endif
}

inline Vector broadcast(float value) { return Vector{} + value; }

bool is_direct(const Task& task) {
  const Layout& layout = *task.weight->layout;
  return task.m <= kDirectRows && !layout.needs_mask() && layout.block_size % kLanes == 0;
}

// kDotOutputs decoded rows: a byte u of block b means (u - biases[b]) * scales[b]. After the last block scales are zero
// up to a multiple of kLanes, and biases finite. Outputs past the end repeat the last row: computed, never stored.
struct DecodedRows {
  const uint8_t* bytes[kDotOutputs];
  const float* scales[kDotOutputs];
  const float* biases[kDotOutputs];
  float* products;  // room for kIntegerRows * kDotOutputs times block_stride floats
};

// Scratch memory of decode_rows: bytes, scales and biases of each row, products. Rows of floats have room for one
// vector that starts at the last block.
size_t decoded_floats(const Layout& layout) { return round_up(layout.blocks(), kLanes) + kLanes; }

size_t decoded_bytes(const Layout& layout) {
  return kDotOutputs * (round_up(layout.columns, 64) + (2 + kIntegerRows) * decoded_floats(layout) * sizeof(float));
}

DecodedRows decode_rows(const Weight& w, size_t first, size_t outputs, void* scratch) {
  const Layout& layout = *w.layout;
  const size_t blocks = layout.blocks(), padded_blocks = round_up(blocks, kLanes);
  const size_t byte_stride = round_up(layout.columns, 64), float_stride = decoded_floats(layout);
  uint8_t* bytes = static_cast<uint8_t*>(scratch);
  float* scales = reinterpret_cast<float*>(bytes + kDotOutputs * byte_stride);
  float* biases = scales + kDotOutputs * float_stride;
  for_each_part(layout, first, first + outputs, 0, layout.columns, [&](const Part& part) {
    const Encoding& e = layout.segments[part.segment].encoding;
    const size_t begin = part.begin / layout.block_size;
    const size_t end = part.end == layout.columns ? padded_blocks : part.end / layout.block_size;
    for (size_t row = part.row_begin; row < part.row_end; ++row) {
      const size_t place = (row - first) * float_stride;
      // The last vector may reach into the next part of the row, which is written later.
      for (size_t block = begin; block < end; block += kLanes) {
        const size_t count = block < blocks ? blocks - block : 0;
        store(scales + place + block, floats_from_halves(w.scales + row * blocks + block, count) * e.unit);
        store(biases + place + block, broadcast(e.bias));
      }
    }
    decode(w, part, bytes + (part.row_begin - first) * byte_stride + part.begin, byte_stride, nullptr);
  });
  DecodedRows decoded;
  for (size_t j = 0; j < kDotOutputs; ++j) {
    const size_t row = smaller(j, outputs - 1);
    decoded.bytes[j] = bytes + row * byte_stride;
    decoded.scales[j] = scales + row * float_stride;
    decoded.biases[j] = biases + row * float_stride;
  }
  decoded.products = biases + kDotOutputs * float_stride;
  return decoded;
}

// Outputs of a tile, with decoded rows: `kernel` takes `rows` rows of A at a time, `single` the rest one by one.
using DecodedKernel = void (*)(const Task& task, const DecodedRows& decoded, size_t i, size_t first, size_t outputs);

template <size_t rows>
void decoded_tile(const Task& task, size_t tile, void* scratch, DecodedKernel kernel, DecodedKernel single) {
  const size_t tile_end = smaller((tile + 1) * task.tile_outputs, task.weight->layout->rows);
  for (size_t first = tile * task.tile_outputs; first < tile_end; first += kDotOutputs) {
    const size_t outputs = smaller(kDotOutputs, tile_end - first);
    const DecodedRows decoded = decode_rows(*task.weight, first, outputs, scratch);
    for (size_t i = 0; i < task.m;) {
      const bool full = task.m - i >= rows;
      (full ? kernel : single)(task, decoded, i, first, outputs);
      i += full ? rows : 1;
    }
  }
}

// B = S.T
template <size_t rows>
void direct_dot_kernel(const Task& task, const DecodedRows& decoded, size_t i, size_t first, size_t outputs) {
  const Layout& layout = *task.weight->layout;
  Vector acc[rows][kDotOutputs] = {};
  for (size_t block = 0; block < layout.blocks(); ++block) {
    Vector sums[rows][kDotOutputs] = {};
    const size_t end = (block + 1) * layout.block_size;
    for (size_t k = block * layout.block_size; k < end; k += kLanes) {
      Vector x[rows];
      for (size_t r = 0; r < rows; ++r) x[r] = load(task.a + (i + r) * task.a_stride + k);
      for (size_t j = 0; j < kDotOutputs; ++j) {
        const Vector weights = floats_from_bytes(decoded.bytes[j] + k) - decoded.biases[j][block];
        for (size_t r = 0; r < rows; ++r) sums[r][j] += x[r] * weights;
      }
    }
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < kDotOutputs; ++j) acc[r][j] += sums[r][j] * decoded.scales[j][block];
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t j = 0; j < outputs; ++j) {
      const float bias = task.bias ? task.bias[first + j] : 0.0f;
      task.y[(i + r) * layout.rows + first + j] = sum_lanes(acc[r][j]) + bias;
    }
  }
}

// B = S: y[i][j] += sum over the part's rows k of a[i][k] * scales[k] * (bytes[k][j] - bias), for `vectors` vectors of
// columns of one block.
template <size_t rows, size_t vectors>
void direct_outer_kernel(const float* a, size_t a_stride, const uint8_t* bytes, size_t stride, const float* scales,
                         float bias, size_t depth, float* y, size_t y_stride) {
  Vector acc[rows][vectors] = {};
  for (size_t k = 0; k < depth; ++k) {
    Vector weights[vectors];
    for (size_t v = 0; v < vectors; ++v) weights[v] = floats_from_bytes(bytes + k * stride + v * kLanes) - bias;
    for (size_t i = 0; i < rows; ++i) {
      const Vector x = broadcast(a[i * a_stride + k] * scales[k]);
      for (size_t v = 0; v < vectors; ++v) acc[i][v] += x * weights[v];
    }
  }
  for (size_t i = 0; i < rows; ++i) {
    for (size_t v = 0; v < vectors; ++v) {
      float* out = y + i * y_stride + v * kLanes;
      store(out, load(out) + acc[i][v]);
    }
  }
}

void direct_outer_tile(const Task& task, size_t tile, uint8_t* bytes) {
  constexpr size_t kVectors = 4;
  const Weight& w = *task.weight;
  const Layout& layout = *w.layout;
  const size_t n = layout.columns;
  const size_t first = tile * task.tile_outputs;
  const size_t last = smaller(first + task.tile_outputs, n);
  for (size_t i = 0; i < task.m; ++i) {
    for (size_t j = first; j < last; ++j) task.y[i * n + j] = task.bias ? task.bias[j] : 0.0f;
  }
  for (size_t begin = 0; begin < layout.rows; begin += kOuterDepth) {
    for_each_part(layout, begin, smaller(begin + kOuterDepth, layout.rows), first, last, [&](const Part& part) {
      const Encoding& e = layout.segments[part.segment].encoding;
      const size_t stride = part.end - part.begin, depth = part.row_end - part.row_begin;
      decode(w, part, bytes, stride, nullptr);
      for (size_t block = part.begin; block < part.end; block += layout.block_size) {
        float scales[kOuterDepth];
        for (size_t k = 0; k < depth; ++k) {
          scales[k] = e.unit * float_from_half(
                                   w.scales[(part.row_begin + k) * layout.blocks() + block / layout.block_size]);
        }
        for (size_t j = block; j < block + layout.block_size;) {
          const bool wide = block + layout.block_size - j >= kVectors * kLanes;
          for (size_t i = 0; i < task.m;) {
            const bool full = task.m - i >= kDirectOuterRows;
            const auto kernel = full ? (wide ? direct_outer_kernel<kDirectOuterRows, kVectors>
                                             : direct_outer_kernel<kDirectOuterRows, 1>)
                                     : (wide ? direct_outer_kernel<1, kVectors> : direct_outer_kernel<1, 1>);
            kernel(task.a + i * task.a_stride + part.row_begin, task.a_stride, bytes + (j - part.begin), stride, scales,
                   e.bias, depth, task.y + i * n + j, n);
            i += full ? kDirectOuterRows : 1;
          }
          j += wide ? kVectors * kLanes : kLanes;
        }
      }
    });
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
  static Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm256_storeu_ps(p, v); }
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
  static Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
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

// steps: of a block, if known at compile time, else 0.
template <typename Step, size_t rows, size_t steps>
void integer_kernel(const Task& task, const DecodedRows& decoded, size_t i, size_t first, size_t outputs) {
  const Layout& layout = *task.weight->layout;
  const size_t columns = layout.columns, blocks = layout.blocks(), stride = task.block_stride;
  const size_t block_steps = steps ? steps : layout.block_size / Step::kBytes;
  typename Step::Floats acc[rows][kDotOutputs];
  for (size_t r = 0; r < rows; ++r) {
    const float* sums = task.sums + (i + r) * stride;
    const float* a_scales = task.scales + (i + r) * stride;
    for (size_t j = 0; j < kDotOutputs; ++j) {
      float* products = decoded.products + (r * kDotOutputs + j) * stride;
      acc[r][j] = Step::zero_floats();
      for (size_t block = 0; block < blocks; block += Step::kBytes / 4) {
        const typename Step::Floats scales = Step::load_floats(decoded.scales[j] + block);
        acc[r][j] -= Step::load_floats(sums + block) * scales * Step::load_floats(decoded.biases[j] + block);
        Step::store_floats(products + block, Step::load_floats(a_scales + block) * scales);
      }
    }
  }
  for (size_t block = 0, k = 0; block < blocks; ++block) {
    typename Step::Integers sums[rows][kDotOutputs];
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < kDotOutputs; ++j) sums[r][j] = Step::zero();
    }
    for (size_t step = 0; step < block_steps; ++step, k += Step::kBytes) {
      typename Step::Integers codes[rows];
      for (size_t r = 0; r < rows; ++r) codes[r] = Step::load(task.codes + (i + r) * columns + k);
      for (size_t j = 0; j < kDotOutputs; ++j) {
        const typename Step::Integers bytes = Step::load(decoded.bytes[j] + k);
        for (size_t r = 0; r < rows; ++r) sums[r][j] = Step::multiply(sums[r][j], bytes, codes[r]);
      }
    }
    for (size_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < kDotOutputs; ++j) {
        const float scale = decoded.products[(r * kDotOutputs + j) * stride + block];
        acc[r][j] = Step::scale(acc[r][j], sums[r][j], scale);
      }
    }
  }
  for (size_t r = 0; r < rows; ++r) {
    for (size_t j = 0; j < outputs; ++j) {
      const float bias = task.bias ? task.bias[first + j] : 0.0f;
      task.y[(i + r) * layout.rows + first + j] = Step::sum(acc[r][j]) + bias;
    }
  }
}

template <typename Step, size_t steps>
void integer_tile(const Task& task, size_t tile, void* scratch) {
  decoded_tile<kIntegerRows>(task, tile, scratch, integer_kernel<Step, kIntegerRows, steps>,
                             integer_kernel<Step, 1, steps>);
}

template <typename Step>
void integer_tile(const Task& task, size_t tile, void* scratch) {
  const size_t steps = task.weight->layout->block_size / Step::kBytes;
  return (steps == 1 ? integer_tile<Step, 1> : steps == 2 ? integer_tile<Step, 2> : integer_tile<Step, 0>)(
      task, tile, scratch);
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
    // 8 partial results, for the sake of the compiler's vectorizer.
    float largest[8] = {}, zero[8] = {};
    for (size_t i = 0; i < block_size; i += 8) {
      for (size_t j = 0; j < 8; ++j) {
        const float magnitude = std::fabs(block[i + j]);
        largest[j] = magnitude > largest[j] ? magnitude : largest[j];
        zero[j] += magnitude * 0.0f;  // NaN if the value is not finite
      }
    }
    float maximum = 0.0f, check = 0.0f;
    for (size_t j = 0; j < 8; ++j) {
      maximum = largest[j] > maximum ? largest[j] : maximum;
      check += zero[j];
    }
    int8_t* out = codes + begin;
    if (check != 0.0f) {
      std::memset(out, 0, block_size);
      scales[begin / block_size] = NAN;
      sums[begin / block_size] = NAN;
      continue;
    }
    const float scale = maximum / 127.0f;
    const float divisor = scale > 0.0f ? scale : 1.0f;
    int sum = 0;
    for (size_t i = 0; i < block_size; ++i) {
      // Adding and taking away 1.5 * 2^23 rounds to an integer, half to even.
      const int code = static_cast<int>((block[i] / divisor + 12582912.0f) - 12582912.0f);
      out[i] = static_cast<int8_t>(code);
      sum += code;
    }
    scales[begin / block_size] = scale;
    sums[begin / block_size] = scale * static_cast<float>(sum);
  }
}

// --- scratch memory --------------------------------------------------------------------------------------------

size_t scratch_bytes(const Task& task) {
  const Layout& layout = *task.weight->layout;
  if (task.codes) return decoded_bytes(layout);
  if (is_direct(task)) return layout.trans_b ? decoded_bytes(layout) : kOuterDepth * task.tile_outputs;
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
#if defined(__AVX512VNNI__)
    if (layout.block_size % Step64::kBytes == 0) return integer_tile<Step64>(task, tile, scratch);
#endif
    return integer_tile<Step32>(task, tile, scratch);
  }
#endif
  if (is_direct(task)) {
    if (!layout.trans_b) return direct_outer_tile(task, tile, memory);
    return decoded_tile<kDirectDotRows>(task, tile, scratch, direct_dot_kernel<kDirectDotRows>, direct_dot_kernel<1>);
  }
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
