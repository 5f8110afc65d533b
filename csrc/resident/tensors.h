// The tensors of one meta-step in global memory.
#pragma once

#include <cstdint>

#include "network.h"

namespace fastmeta::resident {

template <class R>
struct Tensors {
  std::int64_t tasks;
  const R* parameter[most_layers][2];  // of each layer: weight [out, in] and bias [out]
  const R* x[2];                       // of support and query set: [T, N, in]; factored: inner products [T, N, Ns]
  const void* target[2];               // labels [T, N] of 64 bits for cross_entropy, numbers [T, N, out] for the others
  const R* base[2];                    // factored: the data times the first weight, [T, N, out of the first layer]
  const R* alpha;                      // [rate_rows, rate_columns]
  const R* d_losses;                   // [T]; null: 1 / T each
  // Results; null where not wanted.
  R* loss;            // []
  R* losses;          // [T]; wanted always
  R* support_losses;  // [K, T]
  R* outputs;         // [T, Nq, out]
  R* gradient;        // flat, in the order of the parameters' numbers
  R* d_alpha;         // like alpha
  R* coefficients[2];  // factored: of a set's rows in the first weight's gradient, like base
  // Between the two launches, and for what shared memory cannot hold.
  R* task_gradients;  // [T, packed]
  R* rate_products;   // [T, K, layers, 2]: <g_k, lam_(k+1)> of each parameter
  R* tape;            // [T, K, tape]
};

}  // namespace fastmeta::resident
