// What the compiled kernels of the inner update take and where they are found.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/pieces.h"

namespace fastmeta::inner_update {

template <class R>
struct StepArgs {
  Matrix<const R> theta, g;
  Matrix<R> out;
  const R* alpha;
  const Piece* pieces;
  std::int64_t count;  // pieces a row
  bool per_element;
};

template <class R>
struct AdjointArgs {
  Matrix<const R> lam, g;
  Matrix<R> u;
  const R* alpha;
  const Piece* pieces;
  std::int64_t count;
  bool per_element;
  double* sums;  // [T, count]: sum of g * lam over each piece, or null where d_alpha is not wanted or per element
  R* d_alpha;    // [P] where alpha is per element and d_alpha is wanted, else null
  std::int64_t tasks;
};

// Ranges count pieces of all rows, [0, T * count), except in `columns`: pieces of one row, all of its tasks.
template <class R>
struct Kernels {
  void (*step)(const StepArgs<R>&, std::int64_t first, std::int64_t last);
  void (*adjoint)(const AdjointArgs<R>&, std::int64_t first, std::int64_t last);
  void (*columns)(const AdjointArgs<R>&, std::int64_t first, std::int64_t last);
};

struct Table {
  Kernels<float> f32;
  Kernels<double> f64;
};

// Longest piece of `columns`: 8 KiB of a row, enough for the prefetcher, while its sums stay in the first-level cache.
template <class R>
constexpr int columns_width = static_cast<int>(8192 / sizeof(R));

FASTMETA_TABLES

}  // namespace fastmeta::inner_update
