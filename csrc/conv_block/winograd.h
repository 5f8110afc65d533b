// Winograd's transforms along one axis, and of squares.
//
// y = A^T [(G w) . (B^T x)]; the gradients are the transposed maps: d_x = B [(G w) . (A d_y)], d_w = G^T [(B^T x) . (A
// d_y)].
#pragma once

#include "../common/vectors.h"

namespace fastmeta::conv_block {
namespace {

// F(4x4, 3x3): four outputs, six inputs, three weights an axis, by the points 0, +-sqrt(1/2), +-sqrt(2) and infinity,
// whose matrices have entries nearer to one than those of whole numbers, and so round less. Still they round a few
// times more than a direct product, so no value that decides a branch is computed this way.
template <class R>
struct Tile4x4 {
  static constexpr int side = 4, points = 6, all = points * points;
  typedef Vector<R> V;
  static constexpr double q = 1.41421356237309504880, p = q / 2;

  static FASTMETA_INLINE V c(double x) { return splat<R>(static_cast<R>(x)); }

  static FASTMETA_INLINE void input(const V* x, int s, V* y) {  // B^T
    const V a = x[4 * s] - c(2) * x[2 * s], b = c(p) * x[3 * s] - c(q) * x[s];
    const V d = x[4 * s] - c(.5) * x[2 * s], e = c(q) * x[3 * s] - c(p) * x[s];
    y[0] = (x[0] + x[4 * s]) - c(2.5) * x[2 * s];
    y[1] = a + b;
    y[2] = a - b;
    y[3] = d + e;
    y[4] = d - e;
    y[5] = (x[s] + x[5 * s]) - c(2.5) * x[3 * s];
  }

  static FASTMETA_INLINE void input_transposed(const V* y, int s, V* x) {  // B
    const V a = y[s] + y[2 * s], m = y[s] - y[2 * s], b = y[3 * s] + y[4 * s], d = y[3 * s] - y[4 * s];
    x[0] = y[0];
    x[1] = y[5 * s] - c(q) * m - c(p) * d;
    x[2] = -(c(2.5) * y[0] + c(2) * a + c(.5) * b);
    x[3] = c(p) * m + (c(q) * d - c(2.5) * y[5 * s]);
    x[4] = y[0] + (a + b);
    x[5] = y[5 * s];
  }

  static FASTMETA_INLINE void output(const V* y, int s, V* o) {  // A^T
    const V a = y[s] + y[2 * s], m = y[s] - y[2 * s], b = y[3 * s] + y[4 * s], d = y[3 * s] - y[4 * s];
    o[0] = y[0] + (a + b);
    o[1] = c(p) * m + c(q) * d;
    o[2] = c(.5) * a + c(2) * b;
    o[3] = c(p / 2) * m + (c(2 * q) * d + y[5 * s]);
  }

  static FASTMETA_INLINE void output_transposed(const V* o, int s, V* y) {  // A
    const V a = o[0] + c(.5) * o[2 * s], b = c(p) * o[s] + c(p / 2) * o[3 * s];
    const V d = o[0] + c(2) * o[2 * s], e = c(q) * o[s] + c(2 * q) * o[3 * s];
    y[0] = o[0];
    y[1] = a + b;
    y[2] = a - b;
    y[3] = d + e;
    y[4] = d - e;
    y[5] = o[3 * s];
  }

  static FASTMETA_INLINE void weight(const V* w, int s, V* y) {  // G
    const V a = c(-2. / 3) * w[0] - c(1. / 3) * w[2 * s], b = c(-2 * p / 3) * w[s];
    const V d = c(1. / 6) * w[0] + c(1. / 3) * w[2 * s], e = c(q / 6) * w[s];
    y[0] = w[0];
    y[1] = a + b;
    y[2] = a - b;
    y[3] = d + e;
    y[4] = d - e;
    y[5] = w[2 * s];
  }

  static FASTMETA_INLINE void weight_transposed(const V* y, int s, V* w) {  // G^T
    const V a = y[s] + y[2 * s], m = y[s] - y[2 * s], b = y[3 * s] + y[4 * s], d = y[3 * s] - y[4 * s];
    w[0] = y[0] + (c(1. / 6) * b - c(2. / 3) * a);
    w[1] = c(q / 6) * d - c(2 * p / 3) * m;
    w[2] = c(1. / 3) * (b - a) + y[5 * s];
  }
};

// F(2x2, 3x3): sums and halves alone, and a quarter of the terms in each sum, so that rounding is that of a direct
// product.
template <class R>
struct Tile2x2 {
  static constexpr int side = 2, points = 4, all = points * points;
  typedef Vector<R> V;

  static FASTMETA_INLINE void input(const V* x, int s, V* y) {  // B^T
    y[0] = x[0] - x[2 * s];
    y[1] = x[s] + x[2 * s];
    y[2] = x[2 * s] - x[s];
    y[3] = x[s] - x[3 * s];
  }

  static FASTMETA_INLINE void output(const V* y, int s, V* o) {  // A^T
    o[0] = y[0] + (y[s] + y[2 * s]);
    o[1] = (y[s] - y[2 * s]) - y[3 * s];
  }

  static FASTMETA_INLINE void weight(const V* w, int s, V* y) {  // G
    const V half = splat<R>(R(0.5)), sum = w[0] + w[2 * s];
    y[0] = w[0];
    y[1] = half * (sum + w[s]);
    y[2] = half * (sum - w[s]);
    y[3] = w[2 * s];
  }
};

// Applies `axis`, `from` values to `to` values, to the columns and then to the rows of a square of vectors. Values come
// from in(k) as they are needed and go to out(k, value) at once: a square does not fit into registers.
template <int from, int to, class V, class In, class Axis, class Out>
FASTMETA_INLINE void both_axes(In in, Axis axis, Out out) {
  V half[from * to];
#pragma GCC unroll 6
  for (int j = 0; j < from; ++j) {
    V column[from];
#pragma GCC unroll 6
    for (int i = 0; i < from; ++i) column[i] = in(i * from + j);
    axis(column, 1, half + j * to);
  }
#pragma GCC unroll 6
  for (int i = 0; i < to; ++i) {
    V row[to];
    axis(half + i, to, row);
#pragma GCC unroll 6
    for (int j = 0; j < to; ++j) out(i * to + j, row[j]);
  }
}

}  // namespace
}  // namespace fastmeta::conv_block
