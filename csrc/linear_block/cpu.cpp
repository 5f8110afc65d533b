#include "../common/curves.h"
#include "../common/product.h"
#include "../common/transpose.h"
#include "kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// The weight is packed as its transposed, [in, padded(out)]: forward and the weight's gradient then run along rows of
// whole vectors. Only the input's cotangent wants it the other way round, and has it transposed when it comes to that.
// A narrow layer, whose rows would be padding for the most part, has it as [out, padded(in)]: its forward takes dot
// products, and nothing is transposed.

namespace fastmeta::linear_block::FASTMETA_ISA {
namespace {

using executor::Primal;
using executor::Sizes;
using executor::Step;
using executor::Tangent;

template <class R>
struct Layout {
  const Shape& s;
  std::int64_t in, out, x_row;  // padded; distance between rows of x

  explicit Layout(const void* shape)
      : s(*static_cast<const Shape*>(shape)), in(padded<R>(s.in)), out(padded<R>(s.out)), x_row(s.data ? s.in : in) {}

  bool narrow() const { return !s.data && 2 * s.out <= width<R> && s.in >= s.out; }
  bool turns() const { return !s.data && !narrow(); }
  std::int64_t weight_row() const { return narrow() ? in : out; }
  bool identity() const { return s.activation == Activation::identity; }
  bool keeps_input() const {  // z where the slope cannot be had from y
    return s.activation == Activation::silu || s.activation == Activation::gelu || s.activation == Activation::leaky_relu;
  }
  bool bends() const { return s.activation >= Activation::tanh; }

  // Parts of `saved`.
  std::int64_t z() const { return 0; }
  std::int64_t dz() const { return keeps_input() ? s.n * out : 0; }
  std::int64_t turned() const { return dz() + (identity() ? 0 : s.n * out); }  // the weight, [out, padded(in)]
  std::int64_t saved() const { return turned() + (turns() ? s.out * in : 0); }

  // Parts of `saved_dot`: z_dot where the curve bends; the direction, turned.
  std::int64_t z_dots() const { return bends() ? s.n * out : 0; }

  const R* dz_of(const Primal<R>& p) const { return identity() ? p.dy : p.saved + dz(); }
};

template <class R>
Sizes sizes(const void* shape) {
  const Layout<R> l(shape);
  const std::int64_t rows = l.s.n * l.out;
  Sizes sizes{};
  sizes.y = rows;
  sizes.rereads_y = !l.identity();
  sizes.saved = l.saved();
  sizes.saved_dot = l.z_dots() + (l.turns() ? l.s.out * l.in : 0);
  sizes.scratch = l.identity() ? 0 : rows;  // dz_dot
  sizes.weights[0] = l.narrow() ? l.s.out * l.in : l.s.in * l.out;
  sizes.weights[1] = l.s.bias ? l.out : 0;
  sizes.turned = l.turns() ? l.s.out * l.in : 0;
  return sizes;
}

template <class R>
void pack(const void* shape, int which, const R* tensor, R* packed) {
  const Layout<R> l(shape);
  if (which == 1) {
    for (std::int64_t o = 0; o < l.out; ++o) packed[o] = o < l.s.out ? tensor[o] : R(0);
  } else if (l.narrow()) {
    for (std::int64_t o = 0; o < l.s.out; ++o)
      for (std::int64_t i = 0; i < l.in; ++i) packed[o * l.in + i] = i < l.s.in ? tensor[o * l.s.in + i] : R(0);
  } else {
    transpose(tensor, l.s.in, l.s.out, l.s.in, packed);
  }
}

template <class R>
void unpack(const void* shape, int which, const R* packed, R* tensor) {
  const Layout<R> l(shape);
  if (which == 1 || l.narrow()) {
    const std::int64_t rows = which == 1 ? 1 : l.s.out, columns = which == 1 ? l.s.out : l.s.in;
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j) tensor[i * columns + j] = packed[i * l.in + j];
    return;
  }
  constexpr std::int64_t edge = 8;
  for (std::int64_t i0 = 0; i0 < l.s.in; i0 += edge)
    for (std::int64_t o = 0; o < l.s.out; ++o)
      for (std::int64_t i = i0; i < l.s.in && i < i0 + edge; ++i) tensor[o * l.s.in + i] = packed[i * l.out + o];
}

template <class R>
void turn(const void* shape, const R* packed, R* turned) {
  const Layout<R> l(shape);
  transpose(packed, l.out, l.s.in, l.s.out, turned);
}

// Runs `f` with the curve of the shape's activation, if there is one.
template <class R, class F>
FASTMETA_INLINE void with_curve(Activation activation, F f) {
  if (activation != Activation::identity) for_curve<R>(activation, f);
}

// out [n, padded(out)] = base + sum of a W^T.
template <class R>
void to_outputs(const Layout<R>& l, Term<R>* terms, int count, const R* base, R* out) {
  if (l.narrow()) return dot_products(terms, count, l.s.n, l.s.out, base, out, l.out);
  product(terms, count, l.s.n, l.s.out, Result<R>{out, l.out, base});
}

// A term of the weight's gradient: the outer products of the rows of dz and x.
template <class R>
Term<R> outer_products(const Layout<R>& l, const R* x, std::int64_t x_row, const R* dz) {
  if (l.narrow()) return {dz, 1, l.out, x, l.in, l.s.n};
  return {x, 1, x_row, dz, l.out, l.s.n};
}

template <class R>
void to_weight(const Layout<R>& l, const Term<R>* terms, int count, const Step<R>& step, R* dw) {
  const std::int64_t rows = l.narrow() ? l.s.out : l.s.in, columns = l.narrow() ? l.s.in : l.s.out;
  const R rate = step.from[0] != nullptr ? *step.rate[0] : R(0);
  product(terms, count, rows, columns, Result<R>{dw, l.weight_row(), nullptr, step.from[0], rate});
}

// The weight as [out, padded(in)]; where it has to be transposed, it is put at `place`.
template <class R>
const R* turned(const Layout<R>& l, const R* weight, R* place) {
  if (l.narrow()) return weight;
  transpose(weight, l.out, l.s.in, l.s.out, place);
  return place;
}

// The bias's gradient: sums over the rows of dz.
template <class R>
void to_bias(const Layout<R>& l, const R* dz, const Step<R>& step, R* db) {
  for (std::int64_t j = 0; j < l.out; j += width<R>) {
    Vector<R> total{};
    for (std::int64_t i = 0; i < l.s.n; ++i) total += load(dz + i * l.out + j);
    if (step.from[1] != nullptr) total = load(step.from[1] + j) - *step.rate[1] * total;
    store(db + j, total);
  }
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape);
  Term<R> term{p.x[0], l.x_row, 1, p.w[0], l.weight_row(), l.s.in};
  to_outputs(l, &term, 1, l.s.bias ? p.w[1] : nullptr, p.y);
  const std::int64_t count = l.s.n * l.out;
  const R slope = static_cast<R>(l.s.slope);
  R *y = p.y, *kept = p.saved + l.z();
  with_curve<R>(l.s.activation, [=](auto curve) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < count; i += width<R>) {
      const Vector<R> z = load(y + i);
      if constexpr (curve.keeps_input) store(kept + i, z);
      store(y + i, curve.value(z, slope));
    }
  });
  clear_padding(l.s.activation, p.y, l.s.n, l.s.out, l.out);
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape);
  const std::int64_t count = l.s.n * l.out;
  const R slope = static_cast<R>(l.s.slope);
  const R *y = p.y, *dy = p.dy, *kept = p.saved + l.z();
  R* left = p.saved + l.dz();
  with_curve<R>(l.s.activation, [=](auto curve) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < count; i += width<R>) {
      Vector<R> z{};
      if constexpr (curve.keeps_input) z = load(kept + i);
      store(left + i, curve.slope(load(y + i), z, slope) * load(dy + i));
    }
  });
  const R* dz = l.dz_of(p);
  if (p.dw[0] != nullptr) {
    const Term<R> term = outer_products(l, p.x[0], l.x_row, dz);
    to_weight(l, &term, 1, p.step, p.dw[0]);
  }
  if (p.dw[1] != nullptr) to_bias(l, dz, p.step, p.dw[1]);
  if (p.dx[0] != nullptr) {
    const R* weight = p.turned != nullptr ? p.turned : turned(l, p.w[0], p.saved + l.turned());
    const Term<R> term{dz, l.out, 1, weight, l.in, l.s.out};
    product(&term, 1, l.s.n, l.s.in, Result<R>{p.dx[0], l.in});
  }
}

template <class R>
void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  const Layout<R> l(shape);
  Term<R> terms[2];
  int count = 0;
  if (t.x_dot[0] != nullptr) terms[count++] = {t.x_dot[0], l.in, 1, p.w[0], l.weight_row(), l.s.in};
  if (t.w_dot[0] != nullptr) terms[count++] = {p.x[0], l.x_row, 1, t.w_dot[0], l.weight_row(), l.s.in};
  to_outputs(l, terms, count, l.s.bias ? t.w_dot[1] : nullptr, t.y_dot);
  const std::int64_t elements = l.s.n * l.out;
  const R slope = static_cast<R>(l.s.slope);
  const R *y = p.y, *kept = p.saved + l.z();
  R *y_dot = t.y_dot, *z_dots = t.saved_dot;
  with_curve<R>(l.s.activation, [=](auto curve) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < elements; i += width<R>) {
      Vector<R> z{};
      if constexpr (curve.keeps_input) z = load(kept + i);
      const Vector<R> z_dot = load(y_dot + i);
      if constexpr (curve.bends) store(z_dots + i, z_dot);
      store(y_dot + i, curve.slope(load(y + i), z, slope) * z_dot);
    }
  });
}

template <class R>
void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
  const Layout<R> l(shape);
  const std::int64_t elements = l.s.n * l.out;
  const R slope = static_cast<R>(l.s.slope);
  const R *ys = p.y, *dy = p.dy, *dy_dot = t.dy_dot, *z_dots = t.saved_dot, *kept = p.saved + l.z();
  with_curve<R>(l.s.activation, [=](auto curve) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < elements; i += width<R>) {
      const Vector<R> y = load(ys + i);
      Vector<R> z{};
      if constexpr (curve.keeps_input) z = load(kept + i);
      Vector<R> value = curve.slope(y, z, slope) * load(dy_dot + i);
      if constexpr (curve.bends) value += curve.bend(y, z) * load(dy + i) * load(z_dots + i);
      store(scratch + i, value);
    }
  });
  const R* dz = l.dz_of(p);
  const R* dz_dot = l.identity() ? t.dy_dot : scratch;
  if (t.dw_dot[0] != nullptr) {
    Term<R> terms[2];
    int count = 0;
    terms[count++] = outer_products(l, p.x[0], l.x_row, dz_dot);
    if (t.x_dot[0] != nullptr) terms[count++] = outer_products(l, t.x_dot[0], l.in, dz);
    to_weight(l, terms, count, t.step, t.dw_dot[0]);
  }
  if (t.dw_dot[1] != nullptr) to_bias(l, dz_dot, t.step, t.dw_dot[1]);
  if (t.dx_dot[0] != nullptr) {
    Term<R> terms[2];
    int count = 0;
    const R* weight = l.narrow() ? p.w[0] : p.turned != nullptr ? p.turned : p.saved + l.turned();
    terms[count++] = {dz_dot, l.out, 1, weight, l.in, l.s.out};
    if (t.w_dot[0] != nullptr) {
      const R* weight_dot = turned(l, t.w_dot[0], t.saved_dot + l.z_dots());
      terms[count++] = {dz, l.out, 1, weight_dot, l.in, l.s.out};
    }
    product(terms, count, l.s.n, l.s.in, Result<R>{t.dx_dot[0], l.in});
  }
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,    sizes<R>,   pack<R>,             unpack<R>, forward<R>,
                                 backward<R>, tangent<R>, tangent_backward<R>, turn<R>, true};

}  // namespace

extern const Table table{maps<float>, maps<double>};

}  // namespace fastmeta::linear_block::FASTMETA_ISA
