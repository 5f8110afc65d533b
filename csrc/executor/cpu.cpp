#include "../common/simd.h"
#include "packed.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

namespace fastmeta::packed::FASTMETA_ISA {
namespace {

template <class R>
void step(R* next, const R* own, R rate, const R* g, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += width<R>) store(next + i, load(own + i) - rate * load(g + i));
}

template <class R>
void scale(R* u, R rate, const R* lam, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += width<R>) store(u + i, rate * load(lam + i));
}

template <class R>
void add(R* total, const R* lam, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += width<R>) store(total + i, load(total + i) + load(lam + i));
}

template <class R>
double dot(const R* g, const R* lam, std::int64_t n) {
  constexpr int lanes = width<double>;
  Vector<double> sums{};
  for (std::int64_t i = 0; i < n; i += lanes) {
    Vector<double> a, b;
    for (int l = 0; l < lanes; ++l) {
      a[l] = static_cast<double>(g[i + l]);
      b[l] = static_cast<double>(lam[i + l]);
    }
    sums += a * b;
  }
  return sum<double>(sums);
}

template <class R>
constexpr Kernels<R> kernels{step<R>, scale<R>, add<R>, dot<R>};

}  // namespace

extern const Table table{kernels<float>, kernels<double>};

}  // namespace fastmeta::packed::FASTMETA_ISA
