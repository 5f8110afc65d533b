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
};

struct Table {
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::linear_block
