// Activation functions of numbers, and what their exact second order takes.
//
// Code for curves that no layer has is fetched with the rest, which takes a third of a short meta-step's time: so there
// are kernels for `smooth` curves and for those made of straight pieces.
#pragma once

#include <cmath>

#include "../common/curve_names.h"
#include "../common/host_device.h"

namespace fastmeta::resident {

// f, f' and f'' at z; the derivatives where f alone does not tell them (slope_of, curvature_of).
template <class R>
struct Point {
  R value, slope, bend;
};

template <class R>
FASTMETA_HD R logistic(R z) {
  return R(1) / (R(1) + std::exp(-z));
}

template <bool smooth, class R>
FASTMETA_HD Point<R> point(Activation f, R z, R negative_slope) {
  if constexpr (!smooth) {
    if (f == Activation::relu) return {z > R(0) ? z : (z == z ? R(0) : z), R(0), R(0)};
    if (f == Activation::leaky_relu) return {z > R(0) ? z : negative_slope * z, z > R(0) ? R(1) : negative_slope, R(0)};
    return {z, R(0), R(0)};
  }
  switch (f) {
    case Activation::identity: break;
    case Activation::relu: return {z > R(0) ? z : (z == z ? R(0) : z), R(0), R(0)};
    case Activation::leaky_relu: return {z > R(0) ? z : negative_slope * z, z > R(0) ? R(1) : negative_slope, R(0)};
    case Activation::tanh: return {std::tanh(z), R(0), R(0)};
    case Activation::sigmoid: return {logistic(z), R(0), R(0)};
    case Activation::silu: {
      const R s = logistic(z), d = s * (1 - s);
      return {z * s, s + z * d, 2 * d + z * d * (1 - 2 * s)};
    }
    case Activation::gelu: {
      const R distribution = (1 + std::erf(z * R(0.70710678118654752440))) * R(0.5);
      const R density = std::exp(z * z * R(-0.5)) * R(0.39894228040143267794);
      return {z * distribution, distribution + z * density, (2 - z * z) * density};
    }
  }
  return {z, R(0), R(0)};
}

// f'(z), given f's value y there; `kept`: what `point` gave.
template <bool smooth, class R>
FASTMETA_HD R slope_of(Activation f, R y, const R* kept) {
  if constexpr (!smooth) {
    if (f == Activation::relu) return y > R(0) ? R(1) : R(0);
    return f == Activation::identity ? R(1) : *kept;
  }
  switch (f) {
    case Activation::identity: return R(1);
    case Activation::relu: return y > R(0) ? R(1) : R(0);
    case Activation::tanh: return 1 - y * y;
    case Activation::sigmoid: return y * (1 - y);
    default: return *kept;
  }
}

// f''(z) d_y, given y and d_z = f'(z) d_y; `kept`: that product, where y does not tell it.
template <bool smooth, class R>
FASTMETA_HD R curvature_of(Activation f, R y, R d_z, const R* kept) {
  if constexpr (!smooth) return R(0);
  switch (f) {
    case Activation::tanh: return -2 * y * d_z;
    case Activation::sigmoid: return (1 - 2 * y) * d_z;
    case Activation::silu:
    case Activation::gelu: return *kept;
    default: return R(0);
  }
}

}  // namespace fastmeta::resident
