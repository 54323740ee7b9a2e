// Lists the inner loops of one instruction set. This file is compiled once for each, with FIPS_ISA naming it (generic,
// avx2, avx512, neon, neon_dotprod) and the compiler flags allowing it. Neither it nor the headers of the kernels may
// instantiate a template of the standard library: the linker could then pick the copy made for a better CPU than the
// one it runs on.

#include "kernels.h"

#include "attention/heads.h"
#include "attention/tile.h"
#include "decode/decoded_values.h"
#include "float/decoded_bytes.h"
#include "float/decoded_floats.h"
#include "integer/any_decoded_rows.h"
#include "integer/any_many_rows.h"
#include "integer/bitmap_one_row.h"
#include "integer/dense_few_rows.h"
#include "integer/dense_one_row.h"
#include "integer/dense_outer.h"
#include "integer/n_of_4_few_rows.h"
#include "integer/n_of_4_many_rows.h"
#include "integer/quantize.h"
#include "task/merge_rows.h"
#include "task/outputs.h"

namespace fips {
namespace FIPS_ISA {
namespace {

struct Kernel {
  const char* name;  // of its file
  bool (*supported)(const Layout& layout, size_t m);
  size_t (*scratch_bytes)(const Task& task);
  void (*tile)(const Task& task, const Range& range, void* scratch);
  bool wants_offset = false;
};

// In order of preference: the first that supports a layout and a number of rows of A computes it (docs/ops.md).

// With activations rounded to integers: accuracy_level 4.
constexpr Kernel kIntegerKernels[] = {
    {"integer/bitmap_one_row", bitmap_one_row_supported, bitmap_one_row_scratch_bytes, bitmap_one_row_tile<Vec>},
    {"integer/dense_one_row", dense_one_row_supported, dense_one_row_scratch_bytes, dense_one_row_tile<Vec>},
    {"integer/dense_few_rows", dense_few_rows_supported, dense_few_rows_scratch_bytes, dense_few_rows_tile},
    {"integer/n_of_4_few_rows", n_of_4_few_rows_supported, n_of_4_few_rows_scratch_bytes, n_of_4_few_rows_tile},
    {"integer/n_of_4_many_rows", n_of_4_many_rows_supported, n_of_4_many_rows_scratch_bytes,
     n_of_4_many_rows_tile, kWantsOffset},
    {"integer/any_many_rows", any_many_rows_supported, any_many_rows_scratch_bytes, any_many_rows_tile},
    {"integer/any_decoded_rows", any_decoded_rows_supported, any_decoded_rows_scratch_bytes, any_decoded_rows_tile},
    {"integer/dense_outer", dense_outer_supported, dense_outer_scratch_bytes, dense_outer_tile},
};

// With activations of float32: accuracy_level 0, and what the others leave.
constexpr Kernel kFloatKernels[] = {
    {"float/decoded_bytes", bytes_dot_supported, bytes_dot_scratch_bytes, bytes_dot_tile},
    {"float/decoded_bytes", bytes_outer_supported, bytes_outer_scratch_bytes, bytes_outer_tile},
    {"float/decoded_floats", floats_dot_supported, floats_dot_scratch_bytes, floats_dot_tile},
    {"float/decoded_floats", floats_outer_supported, floats_outer_scratch_bytes, floats_outer_tile},
};

// Null if none does.
template <size_t count>
const Kernel* first_supporting(const Kernel (&kernels)[count], const Layout& layout, size_t m) {
  for (const Kernel& kernel : kernels) {
    if (kernel.supported(layout, m)) return &kernel;
  }
  return nullptr;
}

const Kernel* integer_kernel(const Layout& layout, size_t m) {
  // Sums of a block must stay within 32 bits: 255 · 127 · 65536 < 2^31.
  return layout.block_size > 65536 ? nullptr : first_supporting(kIntegerKernels, layout, m);
}

const Kernel& kernel_of(const Task& task) {
  const Layout& layout = *task.weight->layout;
  return *(task.integers ? integer_kernel(layout, task.m) : first_supporting(kFloatKernels, layout, task.m));
}

const char* kernel_name(const Layout& layout, size_t m) {
  const Kernel* kernel = layout.accuracy_level == 4 ? integer_kernel(layout, m) : nullptr;
  return (kernel ? kernel : first_supporting(kFloatKernels, layout, m))->name;
}

bool supports_integers(const Layout& layout, size_t m) { return integer_kernel(layout, m) != nullptr; }

bool wants_offset(const Layout& layout, size_t m) {
  const Kernel* kernel = integer_kernel(layout, m);
  return kernel && kernel->wants_offset;
}

size_t scratch_bytes(const Task& task) { return kernel_of(task).scratch_bytes(task); }

void run_tile(const Task& task, const Range& range, void* scratch) { kernel_of(task).tile(task, range, scratch); }

#define FIPS_TEXT(name) #name
#define FIPS_NAME(name) FIPS_TEXT(name)

constexpr Kernels all_kernels() {
  Kernels all{};
  all.name = FIPS_NAME(FIPS_ISA);
  all.vector_floats = Vec::kLanes;
  all.kernel_name = kernel_name;
  all.supports_integers = supports_integers;
  all.wants_offset = wants_offset;
  all.scratch_bytes = scratch_bytes;
  all.tile = run_tile;
  all.quantize_block = quantize_block;
  all.largest_magnitude = largest_magnitude;
  all.decode_row = decode_row;
  all.merge_rows = merge_rows;
  all.add_parts = add_parts;
  all.prepare_head = prepare_head;
  all.attend = attend;
  return all;
}

}  // namespace

extern const Kernels kKernels;
constexpr Kernels kKernels = all_kernels();

}  // namespace FIPS_ISA
}  // namespace fips
