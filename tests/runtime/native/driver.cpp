// Runs the kernels of every instruction set on cases read from a file and compares with the expected results.
//
// driver FILE [ISA...]: for each named instruction set prints "ISA cases refused worst": how many products were
// computed, how many weights refused, and the largest difference in units of the largest expected value. Exits with 1
// if one differs by more than its tolerance, if a malformed weight is accepted or a sound one is not.
//
// driver kernels [ISA...]: prints which kernel computes which product (kernel_table.h).
//
// A case is 18 int64 numbers (K, N, transB, block_size, segment_axis, 4 segment sizes, midrise, accuracy_level, keep,
// of, M, bytes of codes, bytes of pattern, number of scales, kind), then codes and pattern and, if the kind is 0
// (sound), scales float16, A [M, K], bias [N] and the expected Y [M, N] float32. Kind 1 is malformed; kind 2 may be
// anything: if it is accepted, it is multiplied with zeros, and nothing is expected but that this ends. Every array
// gets an allocation of its own exact size, so that the address sanitizer sees a read past its end.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernel_table.h"
#include "kernels.h"
#include "matmul.h"
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

// Last tile first on one thread, the others on another: no tile may depend on its place in the order.
void run_on_two_threads(void*, size_t total, void (*fn)(void*, size_t), void* data) {
  std::thread other([&] {
    for (size_t i = 0; i < total / 2; ++i) fn(data, i);
  });
  for (size_t i = total; i > total / 2; --i) fn(data, i - 1);
  other.join();
}

struct Case {
  fips::Attributes attributes;
  size_t m;
  int64_t kind;
  std::vector<uint8_t> codes, pattern;
  std::vector<uint16_t> scales;
  std::vector<float> a, bias, expected;
};

Case read_case(File& file) {
  const std::vector<int64_t> h = file.read<int64_t>(18);
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
  if (result.kind != 0) return result;
  result.scales = file.read<uint16_t>(static_cast<size_t>(h[16]));
  result.a = file.read<float>(m * k);
  result.bias = file.read<float>(n);
  result.expected = file.read<float>(m * n);
  return result;
}

// The largest difference, of the largest expected value.
double run(const Case& c, const fips::Kernels& kernels) {
  const fips::Layout layout(c.attributes);
  const fips::StreamIndex index(layout, c.pattern.data(), c.pattern.size(), c.codes.size());
  fips::Weight weight;
  weight.layout = &layout;
  weight.index = &index;
  weight.codes = c.codes.data();
  weight.codes_size = c.codes.size();
  weight.pattern = c.pattern.data();
  weight.scales = c.scales.data();
  std::vector<float> y(c.expected.size());
  fips::q_matmul(weight, c.a.data(), c.m, c.bias.data(), y.data(), kernels, {run_on_two_threads, nullptr});
  double difference = 0, largest = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    difference = std::fmax(difference, std::fabs(static_cast<double>(y[i]) - static_cast<double>(c.expected[i])));
    largest = std::fmax(largest, std::fabs(static_cast<double>(c.expected[i])));
    if (std::isnan(y[i])) return HUGE_VAL;
  }
  return difference / largest;
}

// Scales and activations of the sizes that an accepted layout asks for, if it is small; false if it was refused.
bool survives(Case c, const fips::Kernels& kernels) {
  try {
    const fips::Layout layout(c.attributes);
    const fips::StreamIndex index(layout, c.pattern.data(), c.pattern.size(), c.codes.size());
    const size_t rows = layout.n_of_m() ? layout.tiles() * fips::kTileRows : layout.rows;
    c.scales.assign(rows * layout.blocks, 0x3c00);
    c.a.assign(c.m * (layout.trans_b ? layout.columns : layout.rows), 0.0f);
    c.bias.assign(layout.trans_b ? layout.rows : layout.columns, 0.0f);
    c.expected.assign(c.m * c.bias.size(), 1.0f);
  } catch (const fips::InvalidWeight&) {
    return false;
  }
  if (run(c, kernels) != 1.0) throw std::runtime_error("a product with zeros is not zero");
  return true;
}

bool is_refused(const Case& c) {
  try {
    const fips::Layout layout(c.attributes);
    const fips::StreamIndex index(layout, c.pattern.data(), c.pattern.size(), c.codes.size());
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
  bool sound = true;
  for (int i = 2; i < argc; ++i) {
    const fips::Kernels& kernels = kernels_of(argv[i]);
    File file(argv[1]);
    size_t cases = 0, refused = 0;
    double worst = 0;
    while (!file.at_end()) {
      const Case c = read_case(file);
      if (c.kind == 1) {
        sound &= is_refused(c);
        ++refused;
      } else if (c.kind == 2) {
        ++(survives(c, kernels) ? cases : refused);
      } else {
        const double difference = run(c, kernels);
        // Without transB, level 4 rounds activations to 15 bits.
        const bool rounds = c.attributes.accuracy_level == 4 && !c.attributes.trans_b;
        sound &= difference < (rounds ? 2e-4 : 5e-6);
        worst = std::fmax(worst, difference);
        ++cases;
      }
    }
    std::printf("%s %zu %zu %g\n", kernels.name, cases, refused, worst);
  }
  return sound ? 0 : 1;
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
