// The operators QMatMul, SparseQMatMul and BitmapQMatMul.
#pragma once

#include "ort/node.h"

namespace fips::ort {

enum class Kind { kDense, kNOfM, kBitmap };

struct MatMulOp : Op {
  MatMulOp(const Api& api_table, Kind op_kind);

  Kind kind;
};

}  // namespace fips::ort
