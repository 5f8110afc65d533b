// Scaled dot-product attention of several heads: y = softmax(scale q k^T + mask) v, head by head.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../executor/operation.h"

namespace fastmeta::attention {

// Inputs: queries [n * rows, heads * dim], keys and values [n * columns, heads * dim], in that order, and perhaps a mask
// of a task's data that is added to the scores: elements of [n, heads, rows, columns], so many apart; 0 where an axis
// repeats. Where a list says which rows of the samples are kept (common/kept_rows.h), queries and keys have the same ones.
struct Shape {
  std::int64_t n, rows, columns, heads, dim;
  double scale;
  bool masked;
  std::int64_t mask[4];
  bool boolean = false;  // the mask has a byte a score instead: zero where a key has no weight
  bool causal = false;   // no key has weight for an earlier query
  bool safe = false;     // a query without a key that has weight gives zeros
};

struct Table {
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::attention
