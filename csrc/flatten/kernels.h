// Images as rows: what lies channels last becomes [n, channels * height * width], channels first, as PyTorch flattens.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../executor/operation.h"

namespace fastmeta::flatten {

struct Shape {
  std::int64_t n, channels, pixels;
};

struct Table {
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::flatten
