// Rows of a table, one for each number in a task's data.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../executor/operation.h"

namespace fastmeta::embedding {

// The input is a task's data: `count` whole numbers of 64 bits in [0, rows). Weight: the table [rows, features].
struct Shape {
  std::int64_t count, rows, features;
  std::int64_t padding;  // a row that gets no gradient; -1 where every one does
};

struct Table {
  executor::Maps<float> f32;
  executor::Maps<double> f64;
  executor::Maps<float> apart32;  // the gradient kept apart
  executor::Maps<double> apart64;
};

FASTMETA_TABLES

}  // namespace fastmeta::embedding
