// The operator QGather.
#pragma once

#include "ort/node.h"

namespace fips::ort {

struct GatherOp : Op {
  explicit GatherOp(const Api& api_table);
};

}  // namespace fips::ort
