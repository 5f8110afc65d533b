// Pooling of images that no convolution takes along.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/pooling.h"
#include "../executor/operation.h"

namespace fastmeta::pool {

struct Shape {
  std::int64_t n, channels, height, width;  // images of one task
  Pooling pool;                             // other than none
};

struct Table {
  bool (*supported)(const Shape&);  // whether the maps below may be called
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::pool
