// The inner loops of one instruction set. This file is compiled once for each, with FIPS_ISA naming it (generic, avx2,
// avx512, neon, neon_dotprod) and the compiler flags allowing it. Neither it nor the headers of the kernels may
// instantiate a template of the standard library: the linker could then pick the copy made for a better CPU than the
// one it runs on.

#include "kernels.h"

#include "float/many_rows.h"
#include "integer/any_decoded_rows.h"
#include "integer/any_many_rows.h"
#include "integer/bitmap_one_row.h"
#include "integer/dense_few_rows.h"
#include "integer/dense_one_row.h"
#include "integer/dense_outer.h"
#include "integer/n_of_4.h"
#include "integer/quantize.h"
#include "task/outputs.h"

namespace fips {
namespace FIPS_ISA {
namespace {

struct Choice {
  bool (*supported)(const Layout& layout, size_t m);
  size_t (*scratch_bytes)(const Task& task);
  void (*tile)(const Task& task, size_t tile, void* scratch);
};

size_t rows_scratch_bytes(const Task& task) { return decoded_bytes(*task.weight->layout); }

// In order of preference; with accuracy_level 4.
const Choice kIntegers[] = {
#if defined(__AVX512VBMI2__)
    {bitmap_supported, bitmap_scratch_bytes, bitmap_tile},
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    {fields_supported, fields_scratch_bytes, fields_tile},
#endif
    {dense_supported, dense_scratch_bytes, dense_tile},
    {tiles_supported, tiles_scratch_bytes, tiles_tile},
    {turned_supported, turned_scratch_bytes, turned_tile},
    {rows_supported, rows_scratch_bytes, integer_rows},
    {outer_supported, outer_scratch_bytes, outer_integer_tile},
};

const Choice* integer_choice(const Layout& layout, size_t m) {
  // Sums of a block must stay within 32 bits: 255 · 127 · 65536 < 2^31.
  if (layout.block_size > 65536) return nullptr;
  for (const Choice& choice : kIntegers) {
    if (choice.supported(layout, m)) return &choice;
  }
  return nullptr;
}

bool supports_integers(const Layout& layout, size_t m) { return integer_choice(layout, m) != nullptr; }

bool wants_offset(const Layout& layout, size_t m) { return tiles_supported(layout, m) && tiles_want_offset(m); }

size_t scratch_bytes(const Task& task) {
  return task.integers ? integer_choice(*task.weight->layout, task.m)->scratch_bytes(task) : float_scratch_bytes(task);
}

void run_tile(const Task& task, size_t tile, void* scratch) {
  (task.integers ? integer_choice(*task.weight->layout, task.m)->tile : float_tile)(task, tile, scratch);
}

#define FIPS_TEXT(name) #name
#define FIPS_NAME(name) FIPS_TEXT(name)

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {FIPS_NAME(FIPS_ISA), kLanes,   supports_integers, wants_offset,
                          scratch_bytes,       run_tile, quantize_block,    add_parts};

}  // namespace FIPS_ISA
}  // namespace fips
