// A linear layer and the activation that follows it: y = f(x W^T + b).
#pragma once

#include <cstdint>

#include "../common/curve_names.h"
#include "../common/isa.h"
#include "../executor/operation.h"

namespace fastmeta::linear_block {

// Weights in order: weight [out, in], bias [out].
struct Shape {
  std::int64_t n, in, out;  // rows of one task
  Activation activation;
  double slope;  // of leaky_relu below 0
  bool bias;
  bool data;  // the input is a task's data: rows of `in` elements, not padded; constant, without a gradient
  // In the Gram form (gram.h): rows of a support and of a query set, and whether this is the query's call.
  std::int64_t support, query;
  bool asks;
  std::int64_t sequences = 0;  // whose rows they are, where a list says which are kept (common/kept_rows.h)
};

struct Table {
  executor::Maps<float> f32;
  executor::Maps<double> f64;
  executor::Maps<float> gram32;
  executor::Maps<double> gram64;
};

FASTMETA_TABLES

}  // namespace fastmeta::linear_block
