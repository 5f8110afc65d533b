// Elementary functions of vectors: float by polynomials of about one unit in the last place, double by the C library.
#pragma once

#include "simd.h"

namespace fastmeta {
namespace {

template <class R>
FASTMETA_INLINE Vector<R> select(typename Simd<R>::Mask condition, Vector<R> yes, Vector<R> no) {
  return condition ? yes : no;
}

template <class R, class F>
FASTMETA_INLINE Vector<R> each(Vector<R> x, F f) {
  R parts[width<R>];
  __builtin_memcpy(parts, &x, sizeof x);
  for (int i = 0; i < width<R>; ++i) parts[i] = f(parts[i]);
  return load(parts);
}

// exp(x) = 2^n exp(r), |r| <= ln(2) / 2 with ln(2) in two parts (W. J. Cody, W. Waite, 1980); exp(r) by its Taylor
// polynomial of degree 7, whose rest is below 1e-8 of it. Below -87.3 the result is 0 rather than subnormal.
FASTMETA_INLINE Vector<float> exponential(Vector<float> x) {
  using V = Vector<float>;
  using I = Simd<float>::Mask;
  const V least = splat(-87.33654f), most = splat(88.72283f);
  const V inside = select<float>(x < least, least, select<float>(x > most, most, x));
  const V shifted = inside * 1.442695041f + 12582912.0f;  // rounds to the nearest whole number in its lowest bits
  const V n = shifted - 12582912.0f;
  V r = inside - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors: at the upper end n is 128, which one exponent cannot hold.
  const I exponent = __builtin_convertvector(n, I);
  const I half = exponent >> 1;
  const I first = (half + 127) << 23, second = (exponent - half + 127) << 23;
  V a, b;
  __builtin_memcpy(&a, &first, sizeof a);
  __builtin_memcpy(&b, &second, sizeof b);
  const V infinity = splat(__builtin_inff());
  V result = p * a * b;
  result = select<float>(x < least, V{}, select<float>(x > most, infinity, result));
  return select<float>(x == x, result, x);
}

FASTMETA_INLINE Vector<double> exponential(Vector<double> x) {
  return each<double>(x, [](double v) { return __builtin_exp(v); });
}

// Near 0, x + x^3 P(x^2) with Cephes' coefficients (S. L. Moshier, tanhf); elsewhere 1 - 2 / (exp(2 |x|) + 1).
FASTMETA_INLINE Vector<float> hyperbolic_tangent(Vector<float> x) {
  using V = Vector<float>;
  const V size = select<float>(x < 0.0f, -x, x), square = x * x;
  V p = splat(-5.70498872745e-3f);
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const V near = p * square * x + x;
  const V far = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
  return select<float>(size < 0.625f, near, select<float>(x < 0.0f, -far, far));
}

FASTMETA_INLINE Vector<double> hyperbolic_tangent(Vector<double> x) {
  return each<double>(x, [](double v) { return __builtin_tanh(v); });
}

template <class V>
FASTMETA_INLINE V logistic(V x) {  // 1 / (1 + exp(-x))
  return 1 / (1 + exponential(-x));
}

FASTMETA_INLINE Vector<float> error_function(Vector<float> x) {
  return each<float>(x, [](float v) { return __builtin_erff(v); });
}

FASTMETA_INLINE Vector<double> error_function(Vector<double> x) {
  return each<double>(x, [](double v) { return __builtin_erf(v); });
}

}  // namespace
}  // namespace fastmeta
