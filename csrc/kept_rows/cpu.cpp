#include <cstring>

#include "../common/kept_rows.h"
#include "../common/simd.h"
#include "kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// Each way is the other's transpose: tangents go the way of values, cotangents the way back, and nothing is saved.

namespace fastmeta::kept_rows::FASTMETA_ISA {
namespace {

using executor::Primal;
using executor::Sizes;
using executor::Tangent;

template <class R>
struct Layout {
  const Shape& s;
  std::int64_t row;

  explicit Layout(const void* shape) : s(*static_cast<const Shape*>(shape)), row(padded<R>(s.features)) {}

  void move(bool back, const void* list, const R* from, R* to) const {
    const KeptRows kept(list, s.sequences);
    const std::size_t bytes = sizeof(R) * row;
    if (!back) {
      for (std::int64_t i = 0; i < kept.count(); ++i) std::memcpy(to + i * row, from + kept.row(i) * row, bytes);
      return;
    }
    std::int64_t next = 0;
    for (std::int64_t i = 0; i <= kept.count(); ++i, ++next) {
      const std::int64_t here = i < kept.count() ? kept.row(i) : s.n;
      std::memset(to + next * row, 0, bytes * (here - next));
      next = here;
      if (i < kept.count()) std::memcpy(to + here * row, from + i * row, bytes);
    }
  }
};

template <class R>
Sizes sizes(const void* shape) {
  const Layout<R> l(shape);
  Sizes sizes{};
  sizes.y = l.s.n * l.row;
  sizes.rereads_x = sizes.rereads_y = false;
  return sizes;
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape);
  l.move(l.s.back, p.target, p.x[0], p.y);
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape);
  if (p.dx[0] != nullptr) l.move(!l.s.back, p.target, p.dy, p.dx[0]);
}

template <class R>
void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  const Layout<R> l(shape);
  l.move(l.s.back, p.target, t.x_dot[0], t.y_dot);
}

template <class R>
void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  const Layout<R> l(shape);
  if (t.dx_dot[0] != nullptr) l.move(!l.s.back, p.target, t.dy_dot, t.dx_dot[0]);
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,   sizes<R>,    nullptr,    nullptr,
                                 forward<R>, backward<R>, tangent<R>, tangent_backward<R>};

}  // namespace

extern const Table table{maps<float>, maps<double>};

}  // namespace fastmeta::kept_rows::FASTMETA_ISA
