#include "../common/curves.h"
#include "../common/kept_rows.h"
#include "kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// Nothing is saved: the sum is cheaper to take again than to keep.

namespace fastmeta::pointwise::FASTMETA_ISA {
namespace {

using executor::Primal;
using executor::Sizes;
using executor::Tangent;

template <class R>
struct Layout {
  const Shape& s;
  std::int64_t rows, row, elements;
  R slope, factors[executor::max_inputs];

  explicit Layout(const void* shape, const void* kept = nullptr)
      : s(*static_cast<const Shape*>(shape)),
        rows(rows_at_work(kept, s.sequences, s.rows)),
        row(padded<R>(s.features)),
        elements(rows * row),
        slope(static_cast<R>(s.slope)),
        factors{static_cast<R>(s.factors[0]), static_cast<R>(s.factors[1])} {}

  // p a + q b at i; either may be absent.
  FASTMETA_INLINE Vector<R> sum_at(const R* const* x, std::int64_t i) const {
    const Vector<R> a = x[0] == nullptr ? Vector<R>{} : factors[0] * load(x[0] + i);
    return x[1] == nullptr ? a : a + factors[1] * load(x[1] + i);
  }
  // Its transpose.
  FASTMETA_INLINE void share(R* const* dx, std::int64_t i, Vector<R> value) const {
    for (int j = 0; j < executor::max_inputs; ++j)
      if (dx[j] != nullptr) store(dx[j] + i, factors[j] * value);
  }
};

template <class R>
Sizes sizes(const void* shape) {
  const Layout<R> l(shape);
  Sizes sizes{};
  sizes.y = l.elements;
  sizes.rereads_x = sizes.rereads_y = l.s.activation != Activation::identity;
  return sizes;
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape, p.target);
  for_curve<R>(l.s.activation, [&](auto curve) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < l.elements; i += width<R>) store(p.y + i, curve.value(l.sum_at(p.x, i), l.slope));
  });
  clear_padding(l.s.activation, p.y, l.rows, l.s.features, l.row);
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape, p.target);
  for_curve<R>(l.s.activation, [&](auto curve) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < l.elements; i += width<R>)
      l.share(p.dx, i, curve.slope(load(p.y + i), l.sum_at(p.x, i), l.slope) * load(p.dy + i));
  });
}

template <class R>
void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  const Layout<R> l(shape, p.target);
  for_curve<R>(l.s.activation, [&](auto curve) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < l.elements; i += width<R>)
      store(t.y_dot + i, curve.slope(load(p.y + i), l.sum_at(p.x, i), l.slope) * l.sum_at(t.x_dot, i));
  });
}

template <class R>
void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  const Layout<R> l(shape, p.target);
  for_curve<R>(l.s.activation, [&](auto curve) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < l.elements; i += width<R>) {
      const Vector<R> y = load(p.y + i), z = l.sum_at(p.x, i);
      Vector<R> value = curve.slope(y, z, l.slope) * load(t.dy_dot + i);
      if constexpr (curve.bends) value += curve.bend(y, z) * load(p.dy + i) * l.sum_at(t.x_dot, i);
      l.share(t.dx_dot, i, value);
    }
  });
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,   sizes<R>,    nullptr,    nullptr,
                                 forward<R>, backward<R>, tangent<R>, tangent_backward<R>};

}  // namespace

extern const Table table{maps<float>, maps<double>};

}  // namespace fastmeta::pointwise::FASTMETA_ISA
