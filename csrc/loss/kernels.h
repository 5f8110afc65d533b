// Losses of one task: a scalar from rows of outputs and the task's own targets.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../executor/operation.h"

namespace fastmeta::loss {

enum class Kind : std::int32_t { squared_error, cross_entropy, binary_cross_entropy };

// Targets: labels [n] of 64 bits for cross_entropy, numbers [n, features] for the others.
struct Shape {
  Kind kind;
  std::int64_t n, features;
  bool mean;             // of all numbers, of all rows that count; otherwise the sum
  std::int64_t ignored;  // label of rows that do not count
};

struct Table {
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::loss
