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

// The bits of x, as whole numbers, and back.
FASTMETA_INLINE Simd<float>::Mask bits_of(Vector<float> x) {
  Simd<float>::Mask bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  return bits;
}

FASTMETA_INLINE Vector<float> of_bits(Simd<float>::Mask bits) {
  Vector<float> x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
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
  const V infinity = splat(__builtin_inff());
  V result = p * of_bits(first) * of_bits(second);
  result = select<float>(x < least, V{}, select<float>(x > most, infinity, result));
  return select<float>(x == x, result, x);
}

FASTMETA_INLINE Vector<double> exponential(Vector<double> x) {
  return each<double>(x, [](double v) { return __builtin_exp(v); });
}

// e / (e + 2) with e = exp(2 |x|) - 1 = 2^n (q + 1) - 1 = 2^n q + (2^n - 1), q = exp(2 r) - 1 by its Taylor polynomial
// of degree 7, |2 r| <= ln(2) / 2: no digits are lost near 0. Beyond 9.1 the result is 1 (or -1) in float.
FASTMETA_INLINE Vector<float> hyperbolic_tangent(Vector<float> x) {
  using V = Vector<float>;
  using I = Simd<float>::Mask;
  const I sign = bits_of(x) & INT32_MIN;
  const V size = of_bits(bits_of(x) & INT32_MAX), inside = select<float>(size > 9.1f, splat(9.1f), size);
  const V shifted = inside * 2.885390082f + 12582912.0f;  // rounds to the nearest whole number in its lowest bits
  const V n = shifted - 12582912.0f;
  V r = inside - n * 0.3466796875f;  // ln(2) / 2 in two parts
  r = r + n * 1.06097220e-4f;
  V p = splat(8.0f / 315);
  p = p * r + 4.0f / 45;
  p = p * r + 4.0f / 15;
  p = p * r + 2.0f / 3;
  p = p * r + 4.0f / 3;
  p = p * r + 2.0f;
  const V q = p * r * r + (r + r);
  const V power = of_bits((bits_of(shifted) << 23) + (127 << 23));  // 2^n; n's own higher bits fall out
  const V e = power * q + (power - 1.0f);
  return of_bits(bits_of(e / (e + 2.0f)) | sign);
}

FASTMETA_INLINE Vector<double> hyperbolic_tangent(Vector<double> x) {
  return each<double>(x, [](double v) { return __builtin_tanh(v); });
}

template <class V>
FASTMETA_INLINE V logistic(V x) {  // 1 / (1 + exp(-x))
  return 1 / (1 + exponential(-x));
}

// The normal distribution at z, given e = exp(-z^2 / 2): one half and an odd polynomial where |z| < 1.5; further out e
// times a polynomial in 1 / (1 + |z| / 2), on z's own side of the curve, so that its lower end keeps its digits. Both
// are least in the largest error, 7e-10 and 2e-7 of the result, of which float's own rounding leaves 8e-8 of 1 in all.
FASTMETA_INLINE Vector<float> normal_distribution(Vector<float> z, Vector<float> e) {
  using V = Vector<float>;
  const V size = of_bits(bits_of(z) & INT32_MAX), square = z * z;
  V centre = splat(3.995911583842826e-07f);
  centre = centre * square - 8.629878720967099e-06f;
  centre = centre * square + 0.00011410449224058539f;
  centre = centre * square - 0.0011861430248245597f;
  centre = centre * square + 0.009973010048270226f;
  centre = centre * square - 0.06649027019739151f;
  centre = centre * square + 0.3989422619342804f;
  const V t = 1.0f / (size * 0.5f + 1.0f);
  V end = splat(0.12152647227048874f);
  end = end * t - 0.3090101480484009f;
  end = end * t + 0.16712939739227295f;
  end = end * t + 0.118390291929245f;
  end = end * t + 0.20425014197826385f;
  end = end * t + 0.1990789920091629f;
  end = (end * t + 1.332335432380205e-05f) * e;
  return select<float>(size < 1.5f, centre * z + 0.5f, select<float>(z > 0, 1.0f - end, end));
}

FASTMETA_INLINE Vector<double> normal_distribution(Vector<double> z, Vector<double>) {
  return each<double>(z, [](double v) { return (1 + __builtin_erf(v * 0.70710678118654752440)) * 0.5; });
}

}  // namespace
}  // namespace fastmeta
