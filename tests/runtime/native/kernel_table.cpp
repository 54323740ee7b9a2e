#include "kernel_table.h"

#include <cstdint>
#include <cstdio>

namespace {

constexpr int64_t kPatterns[][2] = {{0, 0}, {1, 1}, {1, 4}, {2, 4}, {1, 8}, {2, 8}};
constexpr int64_t kBlockSizes[] = {8, 16, 32, 64, 96, 128, 1 << 17};
constexpr int64_t kSegments[][4] = {{9, 0, 0, 0}, {0, 9, 0, 0}, {0, 0, 9, 0}, {0, 0, 0, 9},
                                    {4, 0, 0, 5}, {0, 4, 5, 0}, {0, 4, 0, 5}};
constexpr size_t kRowsOfA[] = {1, 2, 3, 4, 5};

void print_row(const fips::Kernels& kernels, const fips::Attributes& a) {
  try {
    const fips::Layout layout(a);
    for (const size_t m : kRowsOfA) {
      std::printf("%s", kernels.name);
      const int64_t columns = static_cast<int64_t>(layout.columns);
      for (const int64_t value : {a.accuracy_level, a.trans_b, a.keep, a.of, a.midrise, a.block_size, columns,
                                  a.segments[0], a.segments[1], a.segments[2], a.segments[3]}) {
        std::printf(" %lld", static_cast<long long>(value));
      }
      std::printf(" %zu %s\n", m, kernel_names(kernels, layout, m).c_str());
    }
  } catch (const fips::InvalidWeight&) {
    // A block size that this pattern does not have.
  }
}

}  // namespace

std::string kernel_names(const fips::Kernels& kernels, const fips::Layout& layout, size_t m) {
  const std::vector<fips::Layout> layouts = layout.row_layouts();
  if (layouts.empty()) return kernels.kernel_name(layout, m);
  std::string names;
  for (const fips::Layout& segment : layouts) {
    names += (names.empty() ? "" : " ") + std::string(kernels.kernel_name(segment, m));
  }
  return names;
}

void print_kernel_table(const fips::Kernels& kernels) {
  fips::Attributes a{};
  for (a.accuracy_level = 0; a.accuracy_level <= 4; a.accuracy_level += 4) {
    for (a.trans_b = 0; a.trans_b < 2; ++a.trans_b) {
      for (const auto& [keep, of] : kPatterns) {
        a.keep = keep;
        a.of = of;
        for (a.midrise = 0; a.midrise < 2; ++a.midrise) {
          for (const auto& segments : kSegments) {
            int64_t rows = 0;
            for (size_t i = 0; i < a.segments.size(); ++i) rows += a.segments[i] = segments[i];
            for (const int64_t block_size : kBlockSizes) {
              a.block_size = block_size;
              for (const int64_t blocks : {3, 999}) {
                a.k = a.trans_b ? blocks * block_size : rows;
                a.n = a.trans_b ? rows : blocks * block_size;
                print_row(kernels, a);
              }
            }
          }
        }
      }
    }
  }
}
