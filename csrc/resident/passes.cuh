// One warp takes two rows of a set through the network and back, and does the same with their tangents.
//
// No other warp reads what it writes here before the block's next barrier, so that a warp waits for its own lanes alone.
#pragma once

#include "curve.h"
#include "layers.h"
#include "products.cuh"
#include "tensors.h"

namespace fastmeta::resident {

constexpr int ignored_label = -1, wrong_label = -2;  // as labels lie in shared memory

// The rows of one warp in the arrays of a pass.
template <class R>
struct Rows {
  R* pass;
  int count;  // rows of the pass
  int first;  // of the two
  int lane;

  FASTMETA_DEVICE R* at(int place, int stride) const { return pass + count * place + first * stride; }
  FASTMETA_DEVICE R* a(const Layer& l) const { return at(l.a, l.a_stride); }
  FASTMETA_DEVICE R* d(const Layer& l) const { return at(l.d, l.d_stride); }
  // Of what an activation's result tells, nothing is kept, and nothing is read at the place returned.
  FASTMETA_DEVICE R* s(const Layer& l) const { return at(l.s == absent ? l.d : l.s, l.d_stride); }
  FASTMETA_DEVICE R* c(const Layer& l) const { return at(l.c == absent ? l.d : l.c, l.d_stride); }
  template <class P>
  FASTMETA_DEVICE R* p(const P& plan) const { return at(plan.p, plan.last().d_stride); }
};

// A set as its task's block reads it.
template <class R>
struct Set {
  const R* x;         // rows with a 1 behind them, where the first layer has a bias
  const R* base;      // what a factored first layer adds to its product with them
  const R* target;    // numbers
  const int* labels;
  int n;
  R scale;            // of the sum of the rows' losses
};

// Quads of a product that a thread takes at once; float64, which is for checking, has not the registers for two.
template <class P, class R>
constexpr int quads_in_a_row = sizeof(R) > sizeof(float) ? 1 : P::most_unrolled;

// What stands behind the features of two rows: a 1 that the next layer's bias is multiplied by, or nothing.
template <class P, class R>
FASTMETA_DEVICE void put_behind(R* row, int stride, int features, R next, int lane) {
  over_lanes<P>(lane, features, stride, [&](int j) {
    for (int r = 0; r < 2; ++r) row[r * stride + j] = j == features ? next : R(0);
  });
}

template <class R, class P, class Index>
FASTMETA_DEVICE R one_behind(const P& plan, Index layer) {
  if constexpr (P::fixed) {
    if constexpr (Index::value + 1 < P::layers) return plan.at(after(layer)).bias ? R(1) : R(0);
    else return R(0);
  } else {
    return layer + 1 < plan.layers && plan.at(after(layer)).bias ? R(1) : R(0);
  }
}

// What a factored first layer adds to one element of its product.
template <class P, class R>
FASTMETA_DEVICE R base_of(const P& plan, const Set<R>& set, int layer, int row, int feature) {
  return layer == 0 ? set.base[row * plan.first().d_stride + feature] : R(0);
}

template <bool smooth, class P, class R>
FASTMETA_DEVICE void forward(const P& plan, const R* phi, const Set<R>& set, const Rows<R>& rows, bool curvatures) {
  const R* input = set.x + rows.first * plan.first().stride;
  int stride = plan.first().stride;
  upward(plan, [&](auto i) {
    const Layer& l = plan.at(i);
    R* a = rows.a(l);
    const int half = (l.out + 1) / 2;
    over_lanes<P>(rows.lane, 0, half, [&](int j) {
      const R* w = phi + l.w + j * l.stride;
      Dots<R> z;
      z.template add<quads_in_a_row<P, R>>(input, stride, w, w + half * l.stride, l.quads);
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        const int feature = j + f * half;
        if (feature >= l.out) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          R sum = z.sum(r, f);
          if constexpr (P::factors) sum += base_of(plan, set, i, rows.first + r, feature);
          const Point<R> y = point<smooth>(l.activation, sum, static_cast<R>(l.negative_slope));
          a[r * l.a_stride + feature] = y.value;
          if (l.s != absent) rows.s(l)[r * l.d_stride + feature] = y.slope;
          if (curvatures && l.c != absent) rows.c(l)[r * l.d_stride + feature] = y.bend;
        }
      }
    });
    put_behind<P>(a, l.a_stride, l.out, one_behind<R>(plan, i), rows.lane);
    __syncwarp();
    input = a, stride = l.a_stride;
  });
}

// d_y of one element of a layer's result becomes d_z of what its activation was applied to.
template <bool smooth, class R>
FASTMETA_DEVICE void put_cotangent(const Layer& l, const Rows<R>& rows, int r, int j, R d_y, bool curvatures) {
  const int at = r * l.d_stride + j;
  rows.d(l)[at] = slope_of<smooth>(l.activation, rows.a(l)[r * l.a_stride + j], rows.s(l) + at) * d_y;
  if (curvatures && l.c != absent) rows.c(l)[at] *= d_y;
}

// The rows' losses, and their derivative by what the last layer's activation was applied to, times `factor`.
template <bool smooth, class P, class R>
FASTMETA_DEVICE void loss(const P& plan, const Set<R>& set, const Rows<R>& rows, R factor, R* row_loss,
                          bool curvatures) {
  const Layer& l = plan.last();
  int reach = 1;
  while (reach < l.out && reach < warp_size) reach *= 2;
  for (int r = 0; r < 2; ++r) {
    const int row = rows.first + r;
    const bool real = row < set.n;
    const R* y = rows.a(l) + r * l.a_stride;
    R total = 0;
    if (plan.loss == Loss::cross_entropy) {
      R* p = rows.p(plan) + r * l.d_stride;
      const int label = real ? set.labels[row] : ignored_label;
      R largest = y[0];
      for (int j = rows.lane; j < l.out; j += warp_size) largest = y[j] > largest ? y[j] : largest;
      largest = warp_max(largest, reach);
      R sum = 0;
      for (int j = rows.lane; j < l.out; j += warp_size) {
        p[j] = std::exp(y[j] - largest);
        sum += p[j];
      }
      sum = warp_sum(sum, reach);
      const R nan = static_cast<R>(NAN);
      for (int j = rows.lane; j < l.out; j += warp_size) {
        const R q = label >= 0 ? p[j] / sum : label == ignored_label ? R(0) : nan;
        p[j] = q;
        put_cotangent<smooth>(l, rows, r, j, set.scale * factor * (q - (j == label ? R(1) : R(0))), curvatures);
      }
      total = label >= 0 ? std::log(sum) - (y[label] - largest) : label == ignored_label ? R(0) : nan;
    } else {
      for (int j = rows.lane; j < l.out; j += warp_size) {
        const R z = y[j], t = real ? set.target[row * l.out + j] : z;
        R residual;
        if (plan.loss == Loss::squared_error) {
          residual = 2 * (z - t);
          total += (z - t) * (z - t);
        } else {
          const R tail = std::exp(z < 0 ? z : -z), p = (z < 0 ? tail : R(1)) / (1 + tail);
          rows.p(plan)[r * l.d_stride + j] = p;
          residual = p - t;
          total += (z > 0 ? z : R(0)) - z * t + std::log1p(tail);
        }
        put_cotangent<smooth>(l, rows, r, j, set.scale * factor * (real ? residual : R(0)), curvatures);
      }
      total = warp_sum(total, reach);
    }
    if (real && rows.lane == 0) row_loss[row] = total;
  }
  put_behind<P>(rows.d(l), l.d_stride, l.out, R(0), rows.lane);
  __syncwarp();
}

template <bool smooth, class P, class R>
FASTMETA_DEVICE void backward(const P& plan, const R* phi, const Rows<R>& rows, bool curvatures) {
  downward(plan, [&](auto i) {
    const Layer &l = plan.at(i), &below = plan.at(before(i));
    over_lanes<P>(rows.lane, 0, (l.in + 1) / 2, [&](int pair) {
      const int j = 2 * pair;
      Backs<R> d;
      d.template add<quads_in_a_row<P, R>>(rows.d(l), l.d_stride, phi + l.w + j, l.stride, (l.out + 3) / 4);
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        if (j + f >= l.in) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) put_cotangent<smooth>(below, rows, r, j + f, d.sum(r, f), curvatures);
      }
    });
    put_behind<P>(rows.d(below), below.d_stride, below.out, R(0), rows.lane);
    __syncwarp();
  });
}

// Tangents in the direction u, to which a factored first layer adds `rate` times its set's base. A layer's d_dot first
// holds f''(z) d_y z_dot, which its cotangent's tangent begins with.
template <bool smooth, class P, class R>
FASTMETA_DEVICE void tangent(const P& plan, const R* phi, const R* u, const Set<R>& set, R rate, const Rows<R>& rows,
                             const Rows<R>& dots) {
  const R* input = set.x + rows.first * plan.first().stride;
  int stride = plan.first().stride;
  const R* input_dot = nullptr;  // data have no tangent
  upward(plan, [&](auto i) {
    const Layer& l = plan.at(i);
    R *a_dot = dots.a(l), *d_dot = dots.d(l);
    const int half = (l.out + 1) / 2;
    over_lanes<P>(rows.lane, 0, half, [&](int j) {
      const int first = l.w + j * l.stride, second = first + half * l.stride;
      Dots<R> z;
      z.template add<quads_in_a_row<P, R>>(input, stride, u + first, u + second, l.quads);
      if (i > 0) z.template add<quads_in_a_row<P, R>>(input_dot, stride, phi + first, phi + second, l.quads);
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        const int feature = j + f * half;
        if (feature >= l.out) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int at = r * l.d_stride + feature;
          const R y = rows.a(l)[r * l.a_stride + feature];
          R z_dot = z.sum(r, f);
          if constexpr (P::factors) z_dot += rate * base_of(plan, set, i, rows.first + r, feature);
          a_dot[r * l.a_stride + feature] = slope_of<smooth>(l.activation, y, rows.s(l) + at) * z_dot;
          d_dot[at] = curvature_of<smooth>(l.activation, y, rows.d(l)[at], rows.c(l) + at) * z_dot;
        }
      }
    });
    put_behind<P>(a_dot, l.a_stride, l.out, R(0), rows.lane);
    put_behind<P>(d_dot, l.d_stride, l.out, R(0), rows.lane);
    __syncwarp();
    input = rows.a(l), input_dot = a_dot, stride = l.a_stride;
  });
}

template <bool smooth, class R>
FASTMETA_DEVICE void add_cotangent_dot(const Layer& l, const Rows<R>& rows, const Rows<R>& dots, int r, int j,
                                       R d_y_dot) {
  const int at = r * l.d_stride + j;
  dots.d(l)[at] += slope_of<smooth>(l.activation, rows.a(l)[r * l.a_stride + j], rows.s(l) + at) * d_y_dot;
}

// The loss's Hessian times y_dot: 2 y_dot; (diag(p) - p p^T) y_dot; p (1 - p) y_dot.
template <bool smooth, class P, class R>
FASTMETA_DEVICE void loss_tangent(const P& plan, const Set<R>& set, const Rows<R>& rows, const Rows<R>& dots) {
  const Layer& l = plan.last();
  int reach = 1;
  while (reach < l.out && reach < warp_size) reach *= 2;
  for (int r = 0; r < 2; ++r) {
    const R* y_dot = dots.a(l) + r * l.a_stride;
    if (plan.loss == Loss::squared_error) {
      for (int j = rows.lane; j < l.out; j += warp_size)
        add_cotangent_dot<smooth>(l, rows, dots, r, j, 2 * set.scale * y_dot[j]);
      continue;
    }
    const R* p = rows.p(plan) + r * l.d_stride;
    R mean = 0;
    if (plan.loss == Loss::cross_entropy) {
      for (int j = rows.lane; j < l.out; j += warp_size) mean += p[j] * y_dot[j];
      mean = warp_sum(mean, reach);
    }
    for (int j = rows.lane; j < l.out; j += warp_size) {
      const R h = plan.loss == Loss::cross_entropy ? y_dot[j] - mean : (1 - p[j]) * y_dot[j];
      add_cotangent_dot<smooth>(l, rows, dots, r, j, set.scale * p[j] * h);
    }
  }
  __syncwarp();
}

template <bool smooth, class P, class R>
FASTMETA_DEVICE void tangent_backward(const P& plan, const R* phi, const R* u, const Rows<R>& rows,
                                      const Rows<R>& dots) {
  downward(plan, [&](auto i) {
    const Layer &l = plan.at(i), &below = plan.at(before(i));
    over_lanes<P>(rows.lane, 0, (l.in + 1) / 2, [&](int pair) {
      const int j = 2 * pair;
      Backs<R> d;
      d.template add<quads_in_a_row<P, R>>(dots.d(l), l.d_stride, phi + l.w + j, l.stride, (l.out + 3) / 4);
      d.template add<quads_in_a_row<P, R>>(rows.d(l), l.d_stride, u + l.w + j, l.stride, (l.out + 3) / 4);
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        if (j + f >= l.in) continue;
#pragma unroll
        for (int r = 0; r < 2; ++r) add_cotangent_dot<smooth>(below, rows, dots, r, j + f, d.sum(r, f));
      }
    });
    __syncwarp();
  });
}

}  // namespace fastmeta::resident
