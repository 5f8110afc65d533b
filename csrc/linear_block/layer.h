// What every form of a linear layer's weight has in common: the layout, the activation's passes, the bias.
#pragma once

#include "../common/curves.h"
#include "../common/kept_rows.h"
#include "../common/panels.h"
#include "../common/transpose.h"
#include "kernels.h"

namespace fastmeta::linear_block::FASTMETA_ISA {
namespace {

using executor::Primal;
using executor::Sizes;
using executor::Step;
using executor::Tangent;

template <class R>
struct Layout {
  const Shape& s;
  std::int64_t n, in, out, x_row;  // rows at work; padded; distance between rows of x

  explicit Layout(const void* shape, const void* kept = nullptr)
      : s(*static_cast<const Shape*>(shape)),
        n(rows_at_work(kept, s.sequences, s.n)),
        in(padded<R>(s.in)),
        out(padded<R>(s.out)),
        x_row(s.data ? s.in : in) {}

  // A weight from which on products copy it in panels, and threads share them.
  static constexpr std::int64_t large_bytes = std::int64_t{1} << 19;
  bool large() const { return s.in * s.out * static_cast<std::int64_t>(sizeof(R)) >= large_bytes && !narrow(); }
  bool narrow() const { return !s.data && 2 * s.out <= width<R> && s.in >= s.out; }
  bool turns() const { return !s.data && !narrow() && !large(); }  // whether it keeps the weight transposed
  std::int64_t weight_row() const { return narrow() ? in : out; }
  bool identity() const { return s.activation == Activation::identity; }
  bool keeps_input() const {  // z where the slope cannot be had from y
    return s.activation == Activation::silu || s.activation == Activation::gelu ||
           s.activation == Activation::leaky_relu;
  }
  bool bends() const { return s.activation >= Activation::tanh; }

  // Parts of `saved`; behind them what the form of the weight asks for.
  std::int64_t z() const { return 0; }
  std::int64_t dz() const { return keeps_input() ? s.n * out : 0; }
  std::int64_t behind_dz() const { return dz() + (identity() ? 0 : s.n * out); }

  // Parts of `saved_dot`: z_dot where the curve bends, and what the form asks for.
  std::int64_t behind_z_dots() const { return bends() ? s.n * out : 0; }

  const R* dz_of(const Primal<R>& p) const { return identity() ? p.dy : p.saved + dz(); }
};

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

// Runs `f` with the curve of the shape's activation, if there is one.
template <class R, class F>
FASTMETA_INLINE void with_curve(Activation activation, F f) {
  if (activation != Activation::identity) for_curve<R>(activation, f);
}

// Runs `f` for elements from one to another, all of them, on so many threads.
template <class F>
FASTMETA_INLINE void in_parts(std::int64_t count, int threads, F f) {
  constexpr std::int64_t part = 8192;
  if (threads == 1 || count <= part) return f(std::int64_t{0}, count);
  parallel_for((count + part - 1) / part, threads, [&](std::int64_t first, std::int64_t last, int) {
    f(first * part, last * part < count ? last * part : count);
  });
}

// y = f(z), where z lies; z itself is kept where the slope needs it.
template <class R>
void activate(const Layout<R>& l, const Primal<R>& p) {
  const std::int64_t count = l.n * l.out;
  const R slope = static_cast<R>(l.s.slope);
  const int threads = l.large() ? p.threads : 1;
  R *y = p.y, *kept = p.saved + l.z();
  with_curve<R>(l.s.activation, [=](auto curve) __attribute__((always_inline)) {
    in_parts(count, threads, [=](std::int64_t first, std::int64_t last) __attribute__((always_inline)) {
      for (std::int64_t i = first; i < last; i += width<R>) {
        const Vector<R> z = load(y + i);
        if constexpr (curve.keeps_input) store(kept + i, z);
        store(y + i, curve.value(z, slope));
      }
    });
  });
  clear_padding(l.s.activation, p.y, l.n, l.s.out, l.out);
}

// dz = f' dy, kept.
template <class R>
void descend(const Layout<R>& l, const Primal<R>& p) {
  const std::int64_t count = l.n * l.out;
  const R slope = static_cast<R>(l.s.slope);
  const int threads = l.large() ? p.threads : 1;
  const R *y = p.y, *dy = p.dy, *kept = p.saved + l.z();
  R* left = p.saved + l.dz();
  with_curve<R>(l.s.activation, [=](auto curve) __attribute__((always_inline)) {
    in_parts(count, threads, [=](std::int64_t first, std::int64_t last) __attribute__((always_inline)) {
      for (std::int64_t i = first; i < last; i += width<R>) {
        Vector<R> z{};
        if constexpr (curve.keeps_input) z = load(kept + i);
        store(left + i, curve.slope(load(y + i), z, slope) * load(dy + i));
      }
    });
  });
}

// y_dot = f' z_dot, where z_dot lies; z_dot is kept where the curve bends.
template <class R>
void activate_tangent(const Layout<R>& l, const Primal<R>& p, const Tangent<R>& t) {
  const std::int64_t elements = l.n * l.out;
  const R slope = static_cast<R>(l.s.slope);
  const int threads = l.large() ? p.threads : 1;
  const R *y = p.y, *kept = p.saved + l.z();
  R *y_dot = t.y_dot, *z_dots = t.saved_dot;
  with_curve<R>(l.s.activation, [=](auto curve) __attribute__((always_inline)) {
    in_parts(elements, threads, [=](std::int64_t first, std::int64_t last) __attribute__((always_inline)) {
      for (std::int64_t i = first; i < last; i += width<R>) {
        Vector<R> z{};
        if constexpr (curve.keeps_input) z = load(kept + i);
        const Vector<R> z_dot = load(y_dot + i);
        if constexpr (curve.bends) store(z_dots + i, z_dot);
        store(y_dot + i, curve.slope(load(y + i), z, slope) * z_dot);
      }
    });
  });
}

// dz_dot = f' dy_dot + f'' z_dot dy; returned where there is an activation, else dy_dot is what it is.
template <class R>
const R* descend_tangent(const Layout<R>& l, const Primal<R>& p, const Tangent<R>& t, R* dz_dot) {
  if (l.identity()) return t.dy_dot;
  const std::int64_t elements = l.n * l.out;
  const R slope = static_cast<R>(l.s.slope);
  const int threads = l.large() ? p.threads : 1;
  const R *ys = p.y, *dy = p.dy, *dy_dot = t.dy_dot, *z_dots = t.saved_dot, *kept = p.saved + l.z();
  with_curve<R>(l.s.activation, [=](auto curve) __attribute__((always_inline)) {
    in_parts(elements, threads, [=](std::int64_t first, std::int64_t last) __attribute__((always_inline)) {
      for (std::int64_t i = first; i < last; i += width<R>) {
        const Vector<R> y = load(ys + i);
        Vector<R> z{};
        if constexpr (curve.keeps_input) z = load(kept + i);
        Vector<R> value = curve.slope(y, z, slope) * load(dy_dot + i);
        if constexpr (curve.bends) value += curve.bend(y, z) * load(dy + i) * load(z_dots + i);
        store(dz_dot + i, value);
      }
    });
  });
  return dz_dot;
}

// The bias's gradient: sums over the rows of dz.
template <class R>
void to_bias(const Layout<R>& l, const R* dz, const Step<R>& step, R* db) {
  for (std::int64_t j = 0; j < l.out; j += width<R>) {
    Vector<R> total{};
    for (std::int64_t i = 0; i < l.n; ++i) total += load(dz + i * l.out + j);
    if (step.from[1] != nullptr) total = load(step.from[1] + j) - *step.rate[1] * total;
    store(db + j, total);
  }
}

}  // namespace
}  // namespace fastmeta::linear_block::FASTMETA_ISA
