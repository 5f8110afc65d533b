// What the compiled kernels of the adaptive update take and where they are found.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/pieces.h"
#include "form.h"

namespace fastmeta::adaptive_update {

// Where data is null there are zeros to read, or nothing is to be written.
template <class R>
struct States {
  Matrix<R> first, second, largest, buffer;
};

template <class R>
struct StepArgs {
  Matrix<const R> phi, g;
  States<const R> before;
  Matrix<R> phi_after;
  States<R> after;
  const R* alpha;
  bool per_element;
  const Piece* pieces;
  std::int64_t count;  // pieces a row
  R c[coefficients];
};

// Terms of the sums over elements and tasks: the gradients to coefficients, and to one entry of alpha.
constexpr int of_alpha = coefficients;
constexpr int terms = coefficients + 1;

template <class R>
struct AdjointArgs {
  Matrix<const R> phi, g;
  States<const R> before;
  Matrix<const R> lam;
  States<const R> d_after;
  Matrix<R> lam_before, u;
  States<R> d_before;
  const R* alpha;
  bool per_element;
  const Piece* pieces;
  std::int64_t count;
  R c[coefficients];
  double* sums;  // [items, terms], or null where they are not wanted
  R* d_alpha;    // [P] where alpha is per element and sums are wanted
  std::int64_t tasks;
};

// Ranges count pieces of all rows, [0, T * count), except in an adjoint with gradients to one alpha an element: pieces
// of one row, all of its tasks.
template <class R>
struct Kernels {
  void (*step[forms])(const StepArgs<R>&, std::int64_t first, std::int64_t last);
  void (*adjoint[forms])(const AdjointArgs<R>&, std::int64_t first, std::int64_t last);
};

struct Table {
  Kernels<float> f32;
  Kernels<double> f64;
};

// Longest piece: up to fifteen of these stay in the first-level cache.
template <class R>
constexpr int piece_length = static_cast<int>(2048 / sizeof(R));

FASTMETA_TABLES

}  // namespace fastmeta::adaptive_update
