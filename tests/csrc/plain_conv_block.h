// The convolutional block as plain loops over any scalar, and dual numbers to run them with.
//
// With doubles the loops are forward and backward; with dual numbers they are the two tangents, exact to rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../../csrc/conv_block/kernels.h"

namespace {

using namespace fastmeta;
using conv_block::Norm;
using conv_block::Shape;
using std::int64_t;

struct Dual {
  double v = 0, d = 0;
  Dual() = default;
  Dual(double value, double dot = 0) : v(value), d(dot) {}
};
Dual operator+(Dual a, Dual b) { return {a.v + b.v, a.d + b.d}; }
Dual operator-(Dual a, Dual b) { return {a.v - b.v, a.d - b.d}; }
Dual operator*(Dual a, Dual b) { return {a.v * b.v, a.d * b.v + a.v * b.d}; }
Dual operator/(Dual a, Dual b) { return {a.v / b.v, (a.d - a.v / b.v * b.d) / b.v}; }
Dual chain(Dual a, double value, double slope) { return {value, slope * a.d}; }
Dual exp(Dual a) { return chain(a, std::exp(a.v), std::exp(a.v)); }
Dual sqrt(Dual a) { return chain(a, std::sqrt(a.v), 0.5 / std::sqrt(a.v)); }
Dual erf(Dual a) { return chain(a, std::erf(a.v), 2 / std::sqrt(std::acos(-1.)) * std::exp(-a.v * a.v)); }
double value(Dual a) { return a.v; }

template <class T>
using Tensor = std::vector<T>;

template <class T>
struct Plain {
  const Shape& s;
  Tensor<T> x, w[6];  // from w[1] on empty where there is none
  Tensor<T> y, dy, dx, dw[4];
  Tensor<T> z, u, xhat, inverse;
  std::vector<int64_t> argmax;
  int64_t h, w_, ph, pw;
  double margin = std::numeric_limits<double>::infinity();  // the least distance of a decision from its edge

  explicit Plain(const Shape& shape) : s(shape) {
    int64_t* const size[] = {&h, &w_, &ph, &pw};
    for (int i = 0; i < 2; ++i) {
      *size[i] = places(i == 0 ? s.height : s.width, s.dilation[i] * (s.kernel[i] - 1) + 1, s.stride[i], s.padding[i]);
      const bool pooled = s.pool.kind != Pool::none;
      *size[2 + i] = pooled ? places(*size[i], s.pool.kernel[i], s.pool.stride[i], s.pool.padding[i]) : *size[i];
    }
  }

  static int64_t places(int64_t size, int64_t window, int64_t stride, int64_t padding) {
    const int64_t room = size + 2 * padding - window;
    return room < 0 ? 0 : room / stride + 1;
  }

  // visit(place in z, place in x, place in the weight) for every product of the convolution.
  template <class Visit>
  void products(Visit visit) const {
    const int64_t group_in = s.in / s.groups, group_out = s.out / s.groups;
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t o = 0; o < s.out; ++o)
        for (int64_t i = 0; i < group_in; ++i)
          for (int64_t ky = 0; ky < s.kernel[0]; ++ky)
            for (int64_t kx = 0; kx < s.kernel[1]; ++kx)
              for (int64_t a = 0; a < h; ++a)
                for (int64_t b = 0; b < w_; ++b) {
                  const int64_t p = a * s.stride[0] - s.padding[0] + ky * s.dilation[0];
                  const int64_t q = b * s.stride[1] - s.padding[1] + kx * s.dilation[1];
                  if (p < 0 || p >= s.height || q < 0 || q >= s.width) continue;
                  visit(((n * s.out + o) * h + a) * w_ + b,
                        ((n * s.in + o / group_out * group_in + i) * s.height + p) * s.width + q,
                        ((o * group_in + i) * s.kernel[0] + ky) * s.kernel[1] + kx);
                }
  }

  int64_t channel(int64_t at) const { return at / (h * w_) % s.out; }
  T weight(int which, int64_t c, double otherwise) const { return w[which].empty() ? T(otherwise) : w[which][c]; }

  T activate(T v) const {
    switch (s.activation) {
      case Activation::relu: return value(v) > 0 ? v : T(0);
      case Activation::leaky_relu: return value(v) > 0 ? v : T(s.slope) * v;
      case Activation::tanh: return T(1) - T(2) / (exp(T(2) * v) + T(1));
      case Activation::sigmoid: return T(1) / (T(1) + exp(T(0) - v));
      case Activation::silu: return v / (T(1) + exp(T(0) - v));
      case Activation::gelu: return T(0.5) * v * (T(1) + erf(v * T(std::sqrt(0.5))));
      default: return v;
    }
  }
  T slope(T v) const {
    const T e = T(1) / (T(1) + exp(T(0) - v)), t = T(1) - T(2) / (exp(T(2) * v) + T(1));
    switch (s.activation) {
      case Activation::relu: return value(v) > 0 ? T(1) : T(0);
      case Activation::leaky_relu: return value(v) > 0 ? T(1) : T(s.slope);
      case Activation::tanh: return T(1) - t * t;
      case Activation::sigmoid: return e * (T(1) - e);
      case Activation::silu: return e + v * e * (T(1) - e);
      case Activation::gelu:
        return T(0.5) * (T(1) + erf(v * T(std::sqrt(0.5)))) +
               v * exp(T(-0.5) * v * v) * T(1 / std::sqrt(2 * std::acos(-1.)));
      default: return T(1);
    }
  }

  // visit(place in y, place in z) for every pixel of every window.
  template <class Visit>
  void windows(Visit visit) const {
    for (int64_t plane = 0; plane < s.n * s.out; ++plane)
      for (int64_t a = 0; a < ph; ++a)
        for (int64_t b = 0; b < pw; ++b)
          for (int64_t i = 0; i < s.pool.kernel[0]; ++i)
            for (int64_t j = 0; j < s.pool.kernel[1]; ++j) {
              const int64_t p = a * s.pool.stride[0] - s.pool.padding[0] + i;
              const int64_t q = b * s.pool.stride[1] - s.pool.padding[1] + j;
              if (p >= 0 && p < h && q >= 0 && q < w_) visit((plane * ph + a) * pw + b, (plane * h + p) * w_ + q);
            }
  }

  void forward() {
    z.assign(s.n * s.out * h * w_, T(0));
    products([&](int64_t o, int64_t i, int64_t k) { z[o] = z[o] + x[i] * w[0][k]; });
    u = xhat = z;
    if (s.norm == Norm::batch) {
      const T count = T(double(s.n * h * w_));
      Tensor<T> mean(s.out, T(0)), variance = mean;
      for (size_t i = 0; i < z.size(); ++i) mean[channel(i)] = mean[channel(i)] + z[i] / count;
      for (size_t i = 0; i < z.size(); ++i) {
        const T d = z[i] - mean[channel(i)];
        variance[channel(i)] = variance[channel(i)] + d * d / count;
      }
      inverse.clear();
      for (const T& v : variance) inverse.push_back(T(1) / sqrt(v + T(s.eps)));
      for (size_t i = 0; i < z.size(); ++i) {
        const int64_t c = channel(i);
        xhat[i] = (z[i] - mean[c]) * inverse[c];
        u[i] = xhat[i] * weight(2, c, 1) + weight(3, c, 0);
      }
    } else {
      for (size_t i = 0; i < z.size(); ++i) u[i] = z[i] + weight(1, channel(i), 0);
    }
    if (s.norm == Norm::running) {
      inverse.clear();
      for (const T& v : w[5]) inverse.push_back(T(1) / sqrt(v + T(s.eps)));
      for (size_t i = 0; i < z.size(); ++i) {
        const int64_t c = channel(i);
        xhat[i] = (u[i] - w[4][c]) * inverse[c];
        u[i] = xhat[i] * weight(2, c, 1) + weight(3, c, 0);
      }
    }
    Tensor<T> a;
    for (const T& v : u) a.push_back(activate(v));
    if (s.activation == Activation::relu || s.activation == Activation::leaky_relu)
      for (const T& v : u) margin = std::min(margin, std::fabs(value(v)));
    if (s.pool.kind == Pool::none) {
      y = a;
      return;
    }
    y.assign(s.n * s.out * ph * pw, T(0));
    if (s.pool.kind == Pool::average) {
      const T share = T(1. / (s.pool.kernel[0] * s.pool.kernel[1]));
      windows([&](int64_t o, int64_t i) { y[o] = y[o] + a[i] * share; });
      return;
    }
    argmax.assign(y.size(), -1);
    windows([&](int64_t o, int64_t i) {
      if (argmax[o] < 0 || value(a[i]) > value(a[argmax[o]])) argmax[o] = i;
    });
    for (size_t o = 0; o < y.size(); ++o) y[o] = a[argmax[o]];
    windows([&](int64_t o, int64_t i) {
      if (i != argmax[o] && value(y[o]) != 0) margin = std::min(margin, value(y[o]) - value(a[i]));
    });
  }

  void backward() {
    Tensor<T> dv(z.size(), T(0)), dz;
    if (s.pool.kind == Pool::none) dv = dy;
    if (s.pool.kind == Pool::max)
      for (size_t o = 0; o < y.size(); ++o) dv[argmax[o]] = dv[argmax[o]] + dy[o];
    const T share = T(1. / (s.pool.kernel[0] * s.pool.kernel[1]));
    if (s.pool.kind == Pool::average) windows([&](int64_t o, int64_t i) { dv[i] = dv[i] + dy[o] * share; });
    for (size_t i = 0; i < z.size(); ++i) dv[i] = slope(u[i]) * dv[i];
    for (Tensor<T>& d : dw) d.assign(s.out, T(0));
    for (size_t i = 0; i < z.size(); ++i) {
      const int64_t c = channel(i);
      dw[2][c] = dw[2][c] + dv[i] * xhat[i];
      dw[3][c] = dw[3][c] + dv[i];
    }
    dz = dv;
    if (s.norm == Norm::running)
      for (size_t i = 0; i < z.size(); ++i) dz[i] = weight(2, channel(i), 1) * inverse[channel(i)] * dv[i];
    if (s.norm != Norm::batch)
      for (size_t i = 0; i < z.size(); ++i) dw[1][channel(i)] = dw[1][channel(i)] + dz[i];
    if (s.norm == Norm::batch) {
      const T count = T(double(s.n * h * w_));
      for (size_t i = 0; i < z.size(); ++i) {
        const int64_t c = channel(i);
        dz[i] = weight(2, c, 1) * inverse[c] * (dv[i] - dw[3][c] / count - xhat[i] * dw[2][c] / count);
      }
    }
    dx.assign(x.size(), T(0));
    dw[0].assign(w[0].size(), T(0));
    products([&](int64_t o, int64_t i, int64_t k) {
      dx[i] = dx[i] + dz[o] * w[0][k];
      dw[0][k] = dw[0][k] + x[i] * dz[o];
    });
  }
};

}  // namespace
