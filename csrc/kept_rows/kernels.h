// The rows of a value that are kept, one behind the other; or the way back, to rows of zeros in between.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../executor/operation.h"

namespace fastmeta::kept_rows {

struct Shape {
  std::int64_t n, features, sequences;  // all rows, and whose they are (common/kept_rows.h)
  bool back;
};

struct Table {
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::kept_rows
