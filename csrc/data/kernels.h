// A task's data in the layout of values, for operations that read values alone.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../executor/operation.h"

namespace fastmeta::data {

// Data are [n, channels, pixels]; rows have one pixel.
struct Shape {
  std::int64_t n, channels, pixels;
};

struct Table {
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::data
