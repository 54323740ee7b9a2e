// Runs the kernels of every instruction set on cases read from a file and compares with the expected results.
//
// driver FILE [ISA...]: for each named instruction set prints "ISA cases calls refused worst": how many weights were
// multiplied, in how many products, how many refused, and the largest difference in units of what is allowed. Every
// sound case is multiplied with 1 to 5 of its rows, taken here and there, and with all of them, on one thread and, if
// there is work for two, on two, which must agree to the last bit, and once with the CPU told to take subnormal numbers
// for zero. Exits with 1 if a difference is larger than allowed, if a malformed weight is accepted or a sound one is
// not, and prints which case it was (its number in the file), up to ten.
//
// driver kernels [ISA...]: prints which kernel computes which product (kernel_table.h).
//
// A case is 20 int64 numbers (K, N, transB, block_size, segment_axis, 4 segment sizes, midrise, accuracy_level, keep,
// of, M, bytes of codes, bytes of pattern, number of scales, kind, elements of the bias: N or 0, elements of row_bits),
// then codes, pattern, row_bits and, if the kind is 0 (sound), scales float16, A [M, K], bias, and float32 [M, N] each
// the expected Y and the allowed differences, without and with flushed subnormal numbers
// (tests/samples/kernel_bounds.py). Kind 1 is malformed; kind 2 may be anything: if it is accepted, it is multiplied
// with zeros and all of its rows are looked up, and nothing is expected but that this ends. Of kind 3 M rows are looked
// up: scales, their numbers int64 [M], and the expected rows [M, K], exactly. Every array gets an allocation of its own
// exact size, so that the address sanitizer sees a read past its end.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "gather.h"
#include "kernel_table.h"
#include "kernels.h"
#include "matmul.h"
#include "threads.h"
#include "weight/row_order.h"
#include "weight/weight.h"

namespace {

struct File {
  explicit File(const char* path) : handle(std::fopen(path, "rb")) {
    if (!handle) throw std::runtime_error(std::string("cannot open ") + path);
  }
  ~File() { std::fclose(handle); }

  template <typename T>
  std::vector<T> read(size_t count) {
    std::vector<T> values(count);
    if (count && std::fread(values.data(), sizeof(T), count, handle) != count) {
      throw std::runtime_error("file too short");
    }
    values.shrink_to_fit();
    return values;
  }

  bool at_end() {
    const int next = std::fgetc(handle);
    if (next == EOF) return true;
    std::ungetc(next, handle);
    return false;
  }

  std::FILE* handle;
};

// Subnormal numbers count as zero on this thread, where the CPU can, as long as this lives.
class FlushedSubnormals {
 public:
  explicit FlushedSubnormals(bool flush) {
#if defined(__x86_64__)
    before_ = _mm_getcsr();
    if (flush) _mm_setcsr(before_ | 0x8040);
#elif defined(__aarch64__)
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    if (flush) asm volatile("msr fpcr, %0" ::"r"(before_ | 1u << 24));
#else
    static_cast<void>(flush);
#endif
  }
  ~FlushedSubnormals() {
#if defined(__x86_64__)
    _mm_setcsr(before_);
#elif defined(__aarch64__)
    asm volatile("msr fpcr, %0" ::"r"(before_));
#endif
  }
  FlushedSubnormals(const FlushedSubnormals&) = delete;
  FlushedSubnormals& operator=(const FlushedSubnormals&) = delete;

 private:
#if defined(__x86_64__)
  unsigned before_;
#elif defined(__aarch64__)
  uint64_t before_;
#endif
};

struct Case {
  fips::Attributes attributes;
  size_t m;
  int64_t kind;
  std::vector<uint8_t> codes, pattern, row_bits;
  std::vector<uint16_t> scales;
  std::vector<int64_t> indices;
  std::vector<float> a, bias, expected, allowed, flushed;
};

Case read_case(File& file) {
  const std::vector<int64_t> h = file.read<int64_t>(20);
  const size_t k = static_cast<size_t>(h[0]), n = static_cast<size_t>(h[1]), m = static_cast<size_t>(h[13]);
  Case result;
  result.attributes.k = h[0];
  result.attributes.n = h[1];
  result.attributes.trans_b = h[2];
  result.attributes.block_size = h[3];
  result.attributes.segment_axis = h[4];
  result.attributes.segments = {h[5], h[6], h[7], h[8]};
  result.attributes.midrise = h[9];
  result.attributes.accuracy_level = h[10];
  result.attributes.keep = h[11];
  result.attributes.of = h[12];
  result.m = m;
  result.kind = h[17];
  result.codes = file.read<uint8_t>(static_cast<size_t>(h[14]));
  result.pattern = file.read<uint8_t>(static_cast<size_t>(h[15]));
  result.row_bits = file.read<uint8_t>(static_cast<size_t>(h[19]));
  if (result.kind == 1 || result.kind == 2) return result;
  result.scales = file.read<uint16_t>(static_cast<size_t>(h[16]));
  if (result.kind == 3) {
    result.indices = file.read<int64_t>(m);
    result.expected = file.read<float>(m * k);
    return result;
  }
  result.a = file.read<float>(m * k);
  result.bias = file.read<float>(static_cast<size_t>(h[18]));
  result.expected = file.read<float>(m * n);
  result.allowed = file.read<float>(m * n);
  result.flushed = file.read<float>(m * n);
  return result;
}

// A weight in memory whose attributes and streams have been checked.
struct CheckedWeight {
  explicit CheckedWeight(const Case& c)
      : layout(c.attributes), index(layout, c.pattern.data(), c.pattern.size(), c.codes.size()) {
    weight.layout = &layout;
    weight.index = &index;
    weight.codes = c.codes.data();
    weight.codes_size = c.codes.size();
    weight.pattern = c.pattern.data();
    weight.scales = c.scales.data();
    if (c.row_bits.empty()) return;
    order.emplace(layout, c.row_bits.data(), c.row_bits.size());
    weight.row_bits = c.row_bits.data();
    weight.row_order = &*order;
  }

  fips::Layout layout;
  fips::StreamIndex index;
  std::optional<fips::RowOrder> order;
  fips::Weight weight{};
};

// Rows [first, first + m) of a case's activations.
std::vector<float> multiply(const Case& c, const fips::Weight& weight, size_t first, size_t m,
                            const fips::Kernels& kernels, fips::ParallelFor parallel_for) {
  const size_t k = c.a.size() / c.m, n = c.expected.size() / c.m;
  const auto begin = c.a.begin() + static_cast<std::ptrdiff_t>(first * k);
  const std::vector<float> a(begin, begin + static_cast<std::ptrdiff_t>(m * k));
  std::vector<float> y(m * n, 12345.0f);
  fips::q_matmul(weight, a.data(), m, c.bias.empty() ? nullptr : c.bias.data(), y.data(), kernels, parallel_for);
  return y;
}

// In units of what is allowed: infinity if a value is or is not finite against expectation. A bound of NaN wants what
// is not finite, an infinite one takes anything.
double difference_of(float actual, float expected, float bound) {
  if (std::isnan(bound)) return std::isfinite(actual) ? HUGE_VAL : 0;
  if (std::isinf(bound) || actual == expected || (std::isnan(actual) && std::isnan(expected))) return 0;
  if (!std::isfinite(actual) || !std::isfinite(expected)) return HUGE_VAL;
  return std::fabs(static_cast<double>(actual) - static_cast<double>(expected)) / static_cast<double>(bound);
}

struct Result {
  double worst = 0;
  size_t calls = 0;
  std::string failure;  // of the first product that differs
};

// y: the outputs of rows [first, …).
void compare(const Case& c, const fips::Kernels& kernels, const fips::Layout& layout, size_t first,
             const std::vector<float>& y, const std::vector<float>& bounds, const char* how, Result& result) {
  ++result.calls;
  const size_t n = c.expected.size() / c.m, m = y.size() / n;
  for (size_t i = 0; i < y.size(); ++i) {
    const float expected = c.expected[first * n + i], bound = bounds[first * n + i];
    const double difference = difference_of(y[i], expected, bound);
    result.worst = std::fmax(result.worst, difference);
    if (difference <= 1 || !result.failure.empty()) continue;
    char text[256];
    std::snprintf(text, sizeof text, "%s, rows %zu to %zu, %s: Y[%zu, %zu] is %.9g, expected %.9g within %.3g",
                  kernel_names(kernels, layout, m).c_str(), first, first + m - 1, how, first + i / n, i % n,
                  static_cast<double>(y[i]), static_cast<double>(expected), static_cast<double>(bound));
    result.failure = text;
  }
}

// Whether a product is work enough for several threads (matmul.cpp).
bool is_shared(const fips::Layout& layout, size_t m) { return layout.rows * layout.columns * m >= 1 << 16; }

// All products of a sound case.
void run(const Case& c, const fips::Kernels& kernels, Result& result) {
  constexpr size_t kPlaces = 16;  // at most, of each number of rows
  const CheckedWeight checked(c);
  const auto run_rows = [&](size_t first, size_t m) {
    const auto one = multiply(c, checked.weight, first, m, kernels, {run_on_one_thread, nullptr});
    compare(c, kernels, checked.layout, first, one, c.allowed, "one thread", result);
    if (!is_shared(checked.layout, m)) return;
    const auto two = multiply(c, checked.weight, first, m, kernels, {run_on_two_threads, nullptr});
    compare(c, kernels, checked.layout, first, two, c.allowed, "two threads", result);
    if (std::memcmp(one.data(), two.data(), one.size() * sizeof(float)) != 0 && result.failure.empty()) {
      result.failure = "two threads give other bits than one";
    }
  };
  for (size_t m = 1; m <= 5 && m < c.m; ++m) {
    const size_t step = std::max<size_t>(1, (c.m - m) / kPlaces);
    for (size_t first = 0, place = 0; first + m <= c.m && place < kPlaces; first += step, ++place) run_rows(first, m);
  }
  run_rows(0, c.m);
  // No rows: nothing is written.
  fips::q_matmul(checked.weight, nullptr, 0, nullptr, nullptr, kernels, {run_on_one_thread, nullptr});
  const FlushedSubnormals flushed(true);
  compare(c, kernels, checked.layout, 0, multiply(c, checked.weight, 0, c.m, kernels, {run_on_one_thread, nullptr}),
          c.flushed, "subnormal numbers flushed", result);
}

// Looks all rows of a case up, on one thread and on two, and some that do not exist.
void look_up(const Case& c, const fips::Kernels& kernels, Result& result) {
  const CheckedWeight checked(c);
  for (const auto run_on_threads : {run_on_one_thread, run_on_two_threads}) {
    std::vector<float> y(c.expected.size(), 12345.0f);
    fips::q_gather(checked.weight, c.indices.data(), c.m, y.data(), kernels, {run_on_threads, nullptr});
    ++result.calls;
    if (std::memcmp(y.data(), c.expected.data(), y.size() * sizeof(float)) != 0) result.failure = "other rows";
  }
  for (const int64_t index : {int64_t{-1}, static_cast<int64_t>(checked.layout.rows), INT64_MIN, INT64_MAX}) {
    try {
      fips::q_gather(checked.weight, &index, 1, nullptr, kernels, {run_on_one_thread, nullptr});
      result.failure = "a row that does not exist is looked up";
    } catch (const std::invalid_argument&) {
    }
  }
}

// Scales and activations of the sizes that an accepted layout asks for, if it is small; false if it was refused.
bool survives(Case c, const fips::Kernels& kernels) {
  try {
    const CheckedWeight checked(c);
    const fips::Layout& layout = checked.layout;
    const size_t rows = layout.n_of_m() ? layout.tiles() * fips::kTileRows : layout.rows;
    c.scales.assign(rows * layout.blocks, 0x3c00);
    c.a.assign(c.m * (layout.trans_b ? layout.columns : layout.rows), 0.0f);
    c.bias.clear();
    c.expected.assign(c.m * (layout.trans_b ? layout.rows : layout.columns), 0.0f);
  } catch (const fips::InvalidWeight&) {
    return false;
  }
  const CheckedWeight checked(c);
  if (multiply(c, checked.weight, 0, c.m, kernels, {run_on_two_threads, nullptr}) != c.expected) {
    throw std::runtime_error("a product with zeros is not zero");
  }
  const fips::Layout& layout = checked.layout;
  if (layout.trans_b && !layout.columns_cut && !layout.sparse()) {
    std::vector<int64_t> indices(layout.rows);
    for (size_t row = 0; row < layout.rows; ++row) indices[row] = static_cast<int64_t>(row);
    std::vector<float> rows(layout.rows * layout.columns);
    fips::q_gather(checked.weight, indices.data(), indices.size(), rows.data(), kernels, {run_on_two_threads, nullptr});
  }
  return true;
}

bool is_refused(const Case& c) {
  try {
    const CheckedWeight checked(c);
  } catch (const fips::InvalidWeight&) {
    return true;
  }
  return false;
}

const fips::Kernels& kernels_of(const char* isa) {
  const fips::Kernels* kernels = fips::find_kernels(isa);
  if (!kernels) throw std::runtime_error(std::string("no kernels for ") + isa);
  return *kernels;
}

int run_all(int argc, char** argv) {
  constexpr size_t kMostFailures = 10;
  size_t failures = 0;
  const auto fail = [&](const char* isa, size_t number, const std::string& what) {
    if (++failures <= kMostFailures) std::fprintf(stderr, "case %zu: %s, %s\n", number, isa, what.c_str());
  };
  for (int i = 2; i < argc; ++i) {
    const fips::Kernels& kernels = kernels_of(argv[i]);
    File file(argv[1]);
    size_t cases = 0, refused = 0, calls = 0;
    double worst = 0;
    for (size_t number = 0; !file.at_end(); ++number) {
      const Case c = read_case(file);
      if (c.kind == 1) {
        if (!is_refused(c)) fail(kernels.name, number, "a malformed weight is accepted");
        ++refused;
      } else if (c.kind == 2) {
        ++(survives(c, kernels) ? cases : refused);
        ++calls;
      } else {
        Result result;
        try {
          (c.kind == 3 ? look_up : run)(c, kernels, result);
        } catch (const fips::InvalidWeight& error) {
          result.failure = std::string("a sound weight is refused: ") + error.what();
        }
        if (!result.failure.empty()) fail(kernels.name, number, result.failure);
        worst = std::fmax(worst, result.worst);
        calls += result.calls;
        ++cases;
      }
    }
    std::printf("%s %zu %zu %zu %g\n", kernels.name, cases, calls, refused, worst);
  }
  return failures ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc > 1 && std::string(argv[1]) == "kernels") {
      for (int i = 2; i < argc; ++i) print_kernel_table(kernels_of(argv[i]));
      return 0;
    }
    return run_all(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "driver: %s\n", error.what());
    return 2;
  }
}
