// The formulas of an adaptive step and of its adjoint (docs/maths.md, eq. 19 to 21), for one parameter of one task, or
// for as many side by side as a vector holds: V is a number or a vector of them, R the number.
//
// Compiled without contraction to fused multiply-adds, as inner_update is, so that every instruction set returns the
// same bits, and a vector the same as its elements.
#pragma once

#include "../common/elementary.h"
#include "form.h"

namespace fastmeta::adaptive_update {
namespace {  // one copy a file, see common/isa.h

template <class V>
struct Moments {
  V first, second, largest, buffer;
};

// A step, (19): the state after it, and what is met on the way.
template <class V>
struct Forward {
  V d;
  Moments<V> after;
  V root, denominator, ratio;
  V along;
};

// Its adjoint, (20): cotangents of what the step has, and of the state before it.
template <class V>
struct Backward {
  Moments<V> before;
  V d;              // and so of the gradient
  V first, second;  // of the moments after the step, in all
  V buffer;         // of the buffer after the step, or of the ratio
  V along, numerator, denominator, inside;
};

// No name may stand for another function of <cmath>'s: the linker would keep one copy for all instruction sets.
FASTMETA_INLINE float root_of_positive(float x) { return __builtin_sqrtf(x); }
FASTMETA_INLINE double root_of_positive(double x) { return __builtin_sqrt(x); }
template <class R>
FASTMETA_INLINE Vector<R> root_of_positives(Vector<R> x) {
  return each<R>(x, [](R v) { return root_of_positive(v); });
}
FASTMETA_INLINE Vector<float> root_of_positive(Vector<float> x) { return root_of_positives<float>(x); }
FASTMETA_INLINE Vector<double> root_of_positive(Vector<double> x) { return root_of_positives<double>(x); }

FASTMETA_INLINE float choose(bool condition, float yes, float no) { return condition ? yes : no; }
FASTMETA_INLINE double choose(bool condition, double yes, double no) { return condition ? yes : no; }
template <class V>
FASTMETA_INLINE V choose(Numbers<V> condition, V yes, V no) {
  return condition ? yes : no;
}

// x / y, and 0 where y is 0.
template <class R, class V>
FASTMETA_INLINE V quotient(V x, V y) {
  const auto none = y == R(0);
  return choose(none, V{}, x / choose(none, V{} + R(1), y));
}

// The square root, and 0 where x is not positive. NaN stays.
template <class R, class V>
FASTMETA_INLINE V root_of(V x) {
  const auto none = x <= R(0);
  return choose(none, V{}, root_of_positive(choose(none, V{} + R(1), x)));
}

template <int F, class R, class V>
FASTMETA_INLINE Forward<V> forward(const R* c, V phi, V g, const Moments<V>& s) {  // (19)
  using Has = Form<F>;
  Forward<V> f;
  f.d = g + c[decay] * phi;
  f.after.first = V{};
  if constexpr (Has::first) f.after.first = c[keep_first] * s.first + c[take_first] * f.d;
  f.after.second = c[keep_second] * s.second + c[take_second] * (f.d * f.d);
  f.after.largest = f.after.second;
  if constexpr (Has::largest) f.after.largest = choose(s.largest > f.after.second, s.largest, f.after.second);
  V inside = f.after.largest * c[of_second];
  if constexpr (Has::centred) inside = inside - f.after.first * f.after.first;
  f.root = root_of<R>(inside + c[eps_root]);
  f.denominator = f.root + c[eps];
  f.ratio = quotient<R>((Has::averaged ? f.after.first : f.d) * c[of_first], f.denominator);
  f.after.buffer = f.ratio;
  if constexpr (Has::buffer) f.after.buffer = c[momentum] * s.buffer + f.ratio;
  f.along = f.after.buffer + c[shrink] * phi;
  return f;
}

// `lam` is the cotangent of the parameter after the step, `after` that of its state.
template <int F, class R, class V>
FASTMETA_INLINE Backward<V> backward(const R* c, const Forward<V>& f, const Moments<V>& s, V alpha, V lam,
                                     const Moments<V>& after) {  // (20)
  using Has = Form<F>;
  Backward<V> b;
  b.along = -(alpha * lam);
  b.buffer = b.along;
  if constexpr (Has::buffer) b.buffer = after.buffer + b.along;
  b.numerator = quotient<R>(b.buffer, f.denominator);
  b.denominator = -(b.numerator * f.ratio);
  b.inside = quotient<R>(b.denominator, R(2) * f.root);
  b.second = b.inside * c[of_second];
  b.before.largest = V{};
  if constexpr (Has::largest) {
    const auto earlier = s.largest > f.after.second;
    const V largest = after.largest + b.second;
    b.before.largest = choose(earlier, largest, V{});
    b.second = choose(earlier, V{}, largest);
  }
  b.second = after.second + b.second;
  const V numerator = b.numerator * c[of_first];
  b.first = V{};
  if constexpr (Has::averaged) b.first = after.first + numerator;
  if constexpr (Has::centred) b.first = after.first - R(2) * (f.after.first * b.inside);
  b.d = R(2) * c[take_second] * (f.d * b.second);
  if constexpr (Has::first) b.d = b.d + c[take_first] * b.first;
  if constexpr (!Has::averaged) b.d = b.d + numerator;
  b.before.first = c[keep_first] * b.first;
  b.before.second = c[keep_second] * b.second;
  b.before.buffer = c[momentum] * b.buffer;
  return b;
}

}  // namespace
}  // namespace fastmeta::adaptive_update
