// What the executor itself does to packed weights: n elements each, a whole number of vectors.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace fastmeta::packed {

template <class R>
struct Kernels {
  void (*step)(R* next, const R* own, R rate, const R* g, std::int64_t n);  // next = own - rate g, eq. (3) and (6)
  void (*scale)(R* u, R rate, const R* lam, std::int64_t n);                // u = rate lam, eq. (5)
  void (*add)(R* total, const R* lam, std::int64_t n);                      // total += lam
  double (*dot)(const R* g, const R* lam, std::int64_t n);                  // in double, eq. (7)
};

struct Table {
  Kernels<float> f32;
  Kernels<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::packed
