#include "../common/prefetch.h"
#include "kernels.h"
#include "math.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

namespace fastmeta::inner_update::FASTMETA_ISA {
namespace {

template <class R>
constexpr int line = static_cast<int>(64 / sizeof(R));  // of the cache
template <class R>
constexpr int chunk = 4 * line<R>;

template <class R>
void step(const StepArgs<R>& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t item = first; item < last; ++item) {
    const std::int64_t t = item / a.count;
    const Piece piece = a.pieces[item % a.count];
    const R* theta = a.theta.data + t * a.theta.row;
    const R* g = a.g.data + t * a.g.row;
    R* out = a.out.data + t * a.out.row;
    if (a.per_element) {
      for (std::int64_t p = piece.begin; p < piece.end; ++p) out[p] = inner_update::step(theta[p], a.alpha[p], g[p]);
    } else {
      const R alpha = a.alpha[piece.entry];
      for (std::int64_t p = piece.begin; p < piece.end; ++p) out[p] = inner_update::step(theta[p], alpha, g[p]);
    }
  }
}

template <class R>
double dot(const R* x, const R* y, std::int64_t n) {
  Sums<R, lanes> sums;
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
FASTMETA_KEEP_LOOP
    for (int l = 0; l < lanes; ++l) sums.add(l, x[i + l], y[i + l]);
  }
  for (int l = 0; i < n; ++i, ++l) sums.add(l, x[i], y[i]);
  double total[lanes];
  for (int l = 0; l < lanes; ++l) total[l] = sums.value(l);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) total[l] += total[l + half];
  return total[0];
}

template <class R>
void adjoint(const AdjointArgs<R>& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t item = first; item < last; ++item) {
    const std::int64_t t = item / a.count;
    const Piece piece = a.pieces[item % a.count];
    const R* lam = a.lam.data + t * a.lam.row;
    R* u = a.u.data + t * a.u.row;
    if (a.sums != nullptr)  // before u is written, which may be lam itself
      a.sums[item] = dot(a.g.data + t * a.g.row + piece.begin, lam + piece.begin, piece.end - piece.begin);
    if (a.per_element) {
      for (std::int64_t p = piece.begin; p < piece.end; ++p) u[p] = inner_update::adjoint(a.alpha[p], lam[p]);
    } else {
      const R alpha = a.alpha[piece.entry];
      for (std::int64_t p = piece.begin; p < piece.end; ++p) u[p] = inner_update::adjoint(alpha, lam[p]);
    }
  }
}

template <class R>
void columns(const AdjointArgs<R>& a, std::int64_t first, std::int64_t last) {
  for (std::int64_t item = first; item < last; ++item) {
    const Piece piece = a.pieces[item];
    const int width = static_cast<int>(piece.end - piece.begin);
    const bool far = a.count > 1;  // the piece of the next row does not follow in memory: no hardware foresees it
    Sums<R, columns_width<R>> sums;
    const R* alpha = a.alpha + piece.begin;
    for (std::int64_t t = 0; t < a.tasks; ++t) {
      const R* lam = a.lam.data + t * a.lam.row + piece.begin;
      const R* g = a.g.data + t * a.g.row + piece.begin;
      R* u = a.u.data + t * a.u.row + piece.begin;
      for (int i = 0; i < width; i += chunk<R>) {
        const int end = i + chunk<R> < width ? i + chunk<R> : width;
        if (far && t + 1 < a.tasks) {
          for (int j = i; j < end; j += line<R>) {
            FASTMETA_PREFETCH_READ(lam + a.lam.row + j);
            FASTMETA_PREFETCH_READ(g + a.g.row + j);
            FASTMETA_PREFETCH_WRITE(u + a.u.row + j);
          }
        }
        for (int j = i; j < end; ++j) sums.add(j, g[j], lam[j]);
        for (int j = i; j < end; ++j) u[j] = inner_update::adjoint(alpha[j], lam[j]);
      }
    }
    for (int i = 0; i < width; ++i) a.d_alpha[piece.begin + i] = static_cast<R>(-sums.value(i));
  }
}

}  // namespace

extern const Table table{{step<float>, adjoint<float>, columns<float>},
                         {step<double>, adjoint<double>, columns<double>}};

}  // namespace fastmeta::inner_update::FASTMETA_ISA
