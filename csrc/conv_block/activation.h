// Activations as values, first and second derivatives of vectors.
#pragma once

#include "../common/curves.h"
#include "../common/vectors.h"
#include "kernels.h"

namespace fastmeta::conv_block {
namespace {

// u above zero, slope * u below: identity, ReLU and leaky ReLU.
template <class R>
struct Piecewise {
  static constexpr bool bends = false;
  Vector<R> slope_below;

  explicit Piecewise(const Shape& s)
      : slope_below(splat<R>(s.activation == Activation::identity     ? R(1)
                             : s.activation == Activation::leaky_relu ? static_cast<R>(s.slope)
                                                                      : R(0))) {}

  FASTMETA_INLINE Vector<R> value(Vector<R> u) const { return select<R>(u > 0, u, u * slope_below); }
  FASTMETA_INLINE Vector<R> slope(Vector<R> u) const { return select<R>(u > 0, splat<R>(1), slope_below); }
  FASTMETA_INLINE Vector<R> bend(Vector<R>) const { return Vector<R>{}; }
};

// The smooth ones. Not inlined: they are long, and stand in many loops.
template <class R>
struct Smooth {
  static constexpr bool bends = true;
  Activation activation;

  explicit Smooth(const Shape& s) : activation(s.activation) {}

  __attribute__((noinline)) Vector<R> value(Vector<R> u) const {
    return apply([=](auto curve) { return decltype(curve)::value(u, R(0)); });
  }
  __attribute__((noinline)) Vector<R> slope(Vector<R> u) const {
    return apply([=](auto curve) { return decltype(curve)::slope(decltype(curve)::value(u, R(0)), u, R(0)); });
  }
  __attribute__((noinline)) Vector<R> bend(Vector<R> u) const {
    return apply([=](auto curve) { return decltype(curve)::bend(decltype(curve)::value(u, R(0)), u); });
  }

 private:
  template <class Use>
  FASTMETA_INLINE Vector<R> apply(Use use) const {
    switch (activation) {
      case Activation::tanh: return use(Curve<R, Activation::tanh>{});
      case Activation::sigmoid: return use(Curve<R, Activation::sigmoid>{});
      case Activation::silu: return use(Curve<R, Activation::silu>{});
      default: return use(Curve<R, Activation::gelu>{});
    }
  }
};

constexpr bool is_piecewise(Activation a) {
  return a == Activation::identity || a == Activation::relu || a == Activation::leaky_relu;
}

}  // namespace
}  // namespace fastmeta::conv_block
