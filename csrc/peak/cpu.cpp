#include "kernels.h"

#include "../common/simd.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

namespace fastmeta::peak::FASTMETA_ISA {
namespace {

// Chains that do not wait for each other, two registers being left for a and b: 14 or 30. Two units that take a
// multiply-add each cycle and need four or five cycles for one are filled by 8 or 10.
constexpr int chains = vector_registers - 2;

template <class R>
R multiply_add(std::int64_t rounds, R a, R b) {
  const Vector<R> factor = splat(a), term = splat(b);
  Vector<R> x[chains];
#pragma GCC unroll 30
  for (int i = 0; i < chains; ++i) x[i] = splat(static_cast<R>(i));
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 30
    for (int i = 0; i < chains; ++i) x[i] = x[i] * factor + term;
  }
  Vector<R> total{};
#pragma GCC unroll 30
  for (int i = 0; i < chains; ++i) total += x[i];
  return sum<R>(total);
}

template <class R>
constexpr Kernels<R> kernels{2 * chains * width<R>, multiply_add<R>};

}  // namespace

extern const Table table{kernels<float>, kernels<double>};

}  // namespace fastmeta::peak::FASTMETA_ISA
