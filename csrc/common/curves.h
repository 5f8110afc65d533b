// Activation functions of vectors with the two derivatives that exact second order takes.
//
// A curve says what it needs besides its result y: `keeps_input` where its slope cannot be had from y. `slope` is f'
// and `bend` f'' at a point, given (y, z) of that point; a curve without bend has f'' = 0 almost everywhere.
#pragma once

#include "curve_names.h"
#include "elementary.h"

namespace fastmeta {
namespace {

template <class R, Activation activation>
struct Curve {
  using V = Vector<R>;
  static constexpr bool is_identity = activation == Activation::identity;
  static constexpr bool keeps_input = activation == Activation::silu || activation == Activation::gelu ||
                                      activation == Activation::leaky_relu;
  static constexpr bool bends = activation >= Activation::tanh;

  static FASTMETA_INLINE V value(V z, [[maybe_unused]] R negative_slope) {
    if constexpr (activation == Activation::relu) return select<R>(z > 0, z, select<R>(z == z, V{}, z));
    if constexpr (activation == Activation::leaky_relu) return select<R>(z > 0, z, negative_slope * z);
    if constexpr (activation == Activation::tanh) return hyperbolic_tangent(z);
    if constexpr (activation == Activation::sigmoid) return logistic(z);
    if constexpr (activation == Activation::silu) return z * logistic(z);
    if constexpr (activation == Activation::gelu) return z * normal_distribution(z, bell(z));
    return z;
  }

  static FASTMETA_INLINE V slope([[maybe_unused]] V y, [[maybe_unused]] V z, [[maybe_unused]] R negative_slope) {
    if constexpr (activation == Activation::relu) return select<R>(y > 0, splat(R(1)), V{});
    if constexpr (activation == Activation::leaky_relu) return select<R>(z > 0, splat(R(1)), splat(negative_slope));
    if constexpr (activation == Activation::tanh) return 1 - y * y;
    if constexpr (activation == Activation::sigmoid) return y * (1 - y);
    if constexpr (activation == Activation::silu) {
      const V s = logistic(z);
      return s + z * s * (1 - s);
    }
    if constexpr (activation == Activation::gelu) {
      const V e = bell(z);
      return normal_distribution(z, e) + z * e * density;
    }
    return splat(R(1));
  }

  static FASTMETA_INLINE V bend([[maybe_unused]] V y, [[maybe_unused]] V z) {
    if constexpr (activation == Activation::tanh) return -2 * y * (1 - y * y);
    if constexpr (activation == Activation::sigmoid) return y * (1 - y) * (1 - 2 * y);
    if constexpr (activation == Activation::silu) {
      const V s = logistic(z), d = s * (1 - s);
      return 2 * d + z * d * (1 - 2 * s);
    }
    if constexpr (activation == Activation::gelu) return (2 - z * z) * bell(z) * density;
    return V{};
  }

 private:
  static constexpr R density = R(0.39894228040143267794);  // of the normal distribution at 0
  static FASTMETA_INLINE V bell(V z) { return exponential(z * z * R(-0.5)); }
};

// f(curve) with the curve of `activation`.
template <class R, class F>
FASTMETA_INLINE void for_curve(Activation activation, F f) {
  switch (activation) {
    case Activation::identity: return f(Curve<R, Activation::identity>{});
    case Activation::relu: return f(Curve<R, Activation::relu>{});
    case Activation::leaky_relu: return f(Curve<R, Activation::leaky_relu>{});
    case Activation::tanh: return f(Curve<R, Activation::tanh>{});
    case Activation::sigmoid: return f(Curve<R, Activation::sigmoid>{});
    case Activation::silu: return f(Curve<R, Activation::silu>{});
    case Activation::gelu: return f(Curve<R, Activation::gelu>{});
  }
}

// Padding of an activation's results, `features` in each of `rows` of `row` elements, zero again: the sigmoid alone has
// another value at 0, the padding's.
template <class R>
void clear_padding(Activation activation, R* y, std::int64_t rows, std::int64_t features, std::int64_t row) {
  if (activation != Activation::sigmoid) return;
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = features; j < row; ++j) y[i * row + j] = 0;
}

}  // namespace
}  // namespace fastmeta
