// Holds what the vectors of every instruction set share: the operations that compilers know for vector types of any
// size. The names are Google Highway's (github.com/google/highway) wherever it has the operation, and so are the tags,
// which say of what type the result is: Vec::Add(a, b) is its hn::Add(a, b), and Vec::Set(f32, 1.0f) its hn::Set(tag,
// 1.0f).
#pragma once

#include "simd/common.h"

namespace fips {
namespace FIPS_ISA {
namespace {

struct U8 {};
struct I32 {};
struct F32 {};
struct F16 {};     // as many as the vector has lanes of 32 bits
struct I8Lane {};  // the same

constexpr U8 u8{};
constexpr I32 i32{};
constexpr F32 f32{};
constexpr F16 f16{};
constexpr I8Lane i8_lane{};

// The vector types of a size, which compilers want as a number, not as a template's argument.
template <size_t bytes>
struct VectorTypes;

#define FIPS_VECTOR_TYPES(bytes)                                              \
  template <>                                                                 \
  struct VectorTypes<bytes> {                                                 \
    typedef uint8_t Bytes __attribute__((vector_size(bytes)));                \
    typedef int32_t Ints __attribute__((vector_size(bytes)));                 \
    typedef float Floats __attribute__((vector_size(bytes)));                 \
    typedef uint16_t Halves __attribute__((vector_size(bytes / 2)));          \
    typedef int8_t NarrowInts __attribute__((vector_size(bytes / 4)));        \
    typedef Bytes UnalignedBytes __attribute__((aligned(1), may_alias));      \
    typedef Floats UnalignedFloats __attribute__((aligned(1), may_alias));    \
  }
FIPS_VECTOR_TYPES(16);
FIPS_VECTOR_TYPES(32);
FIPS_VECTOR_TYPES(64);
#undef FIPS_VECTOR_TYPES

template <size_t bytes>
struct VecBase {
  static constexpr size_t kBytes = bytes;      // of Bytes
  static constexpr size_t kLanes = bytes / 4;  // of Ints and Floats
  using Bytes = typename VectorTypes<bytes>::Bytes;
  using Ints = typename VectorTypes<bytes>::Ints;
  using Floats = typename VectorTypes<bytes>::Floats;
  using Halves = typename VectorTypes<bytes>::Halves;          // float16, as many as lanes
  using NarrowInts = typename VectorTypes<bytes>::NarrowInts;  // int8, as many as lanes

  static Bytes LoadU(U8, const void* p) { return *static_cast<const UnalignedBytes*>(p); }
  static Floats LoadU(F32, const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
  static Halves LoadU(F16, const uint16_t* p) {
    Halves v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  // The first `count`, then zeros.
  static Halves LoadN(F16, const uint16_t* p, size_t count) {
    if (count >= kLanes) return LoadU(f16, p);
    Halves v = {};
#pragma GCC unroll 8  // a loop becomes a call of memcpy
    for (size_t i = 0; i < kLanes; ++i) {
      if (i < count) v[i] = p[i];
    }
    return v;
  }
  static void StoreU(Bytes v, void* p) { *static_cast<UnalignedBytes*>(p) = v; }
  static void StoreU(Floats v, float* p) { *reinterpret_cast<UnalignedFloats*>(p) = v; }
  static void StoreU(NarrowInts v, int8_t* p) { std::memcpy(p, &v, sizeof v); }

  static Bytes Set(U8, uint8_t value) { return Bytes{} + value; }
  static Ints Set(I32, int32_t value) { return Ints{} + value; }
  static Floats Set(F32, float value) { return value - Floats{}; }  // adding would lose the sign of a zero
  static Ints Zero(I32) { return Ints{}; }
  static Floats Zero(F32) { return Floats{}; }
  // 4 bytes, again and again.
  static Bytes LoadDup32(U8, const void* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return BitCast(u8, Set(i32, word));
  }

  static Bytes Add(Bytes a, Bytes b) { return a + b; }
  static Ints Add(Ints a, Ints b) { return a + b; }
  static Floats Add(Floats a, Floats b) { return a + b; }
  static Ints Sub(Ints a, Ints b) { return a - b; }
  static Floats Sub(Floats a, Floats b) { return a - b; }
  static Floats Mul(Floats a, Floats b) { return a * b; }
  static Floats Div(Floats a, Floats b) { return a / b; }
  static Floats Neg(Floats a) { return -a; }
  static Bytes And(Bytes a, Bytes b) { return a & b; }
  static Ints And(Ints a, Ints b) { return a & b; }
  static Bytes Or(Bytes a, Bytes b) { return a | b; }
  // (a & b) | o. Highway's OrAnd, in the register of a: the others are used again.
  static Bytes AndOr(Bytes a, Bytes b, Bytes o) { return (a & b) | o; }
  static Ints Max(Ints a, Ints b) { return a > b ? a : b; }
  // a, if one of them is NaN.
  static Floats Max(Floats a, Floats b) { return b > a ? b : a; }
  template <int count>
  static Ints ShiftLeft(Ints a) {
    return a * (1 << count);
  }
  template <int count>
  static Ints ShiftRight(Ints a) {
    return a >> count;
  }

  static Bytes BitCast(U8, Ints v) { return reinterpret_cast<Bytes>(v); }
  static Ints BitCast(I32, Floats v) { return reinterpret_cast<Ints>(v); }
  static Floats BitCast(F32, Bytes v) { return reinterpret_cast<Floats>(v); }
  static Floats ConvertTo(F32, Ints v) { return __builtin_convertvector(v, Floats); }
  // Of integers that fit.
  static NarrowInts DemoteTo(I8Lane, Ints v) { return __builtin_convertvector(v, NarrowInts); }

  // kLanes bytes as floats: Highway's LoadU, PromoteTo and ConvertTo.
  static Floats LoadConvert(const uint8_t* p) {
    Floats v;
    for (size_t i = 0; i < kLanes; ++i) v[i] = static_cast<float>(static_cast<int>(p[i]));
    return v;
  }

  // What the sum of products of field number n is, from the sum of what UnpackField gave.
  template <int bits>
  static Ints FieldTotal(Ints total, size_t) {
    return total;
  }

  static int32_t ReduceMax(I32, Ints v) {
    int32_t lanes[kLanes];
    std::memcpy(lanes, &v, sizeof lanes);
    for (size_t half = kLanes / 2; half; half /= 2) {
      for (size_t i = 0; i < half; ++i) lanes[i] = lanes[i] < lanes[i + half] ? lanes[i + half] : lanes[i];
    }
    return lanes[0];
  }

 private:
  using UnalignedBytes = typename VectorTypes<bytes>::UnalignedBytes;
  using UnalignedFloats = typename VectorTypes<bytes>::UnalignedFloats;
};

}  // namespace
}  // namespace FIPS_ISA
}  // namespace fips
