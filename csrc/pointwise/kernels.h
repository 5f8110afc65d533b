// An activation of a value, or of a sum of two: y = f(p a) or y = f(p a + q b) with numbers p and q.
#pragma once

#include <cstdint>

#include "../common/curve_names.h"
#include "../common/isa.h"
#include "../executor/operation.h"

namespace fastmeta::pointwise {

struct Shape {
  std::int64_t rows, features;  // images are rows of one pixel's channels
  double factors[executor::max_inputs];
  Activation activation;
  double slope;  // of leaky_relu below 0
  std::int64_t sequences = 0;  // whose rows they are, where a list says which are kept (common/kept_rows.h)
};

struct Table {
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::pointwise
