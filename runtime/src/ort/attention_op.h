// The operators CachedAttention and QKNormCachedAttention.
#pragma once

#include "ort/node.h"

namespace fips::ort {

struct AttentionOp : Op {
  AttentionOp(const Api& api_table, bool with_norms);

  bool norms;
};

}  // namespace fips::ort
