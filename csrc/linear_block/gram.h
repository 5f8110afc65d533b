// A linear layer that reads a task's data, whose weight is never formed for a task, eq. (12): what the inner steps
// change the weight by is a product of cotangents with the support set's rows X, and those never change. So a step
// needs the Gram matrix of X alone, whatever X's width, and the adjoint of the weight stays in factors until it is
// collected.
#pragma once

#include "layer.h"

namespace fastmeta::linear_block::FASTMETA_ISA {
namespace {
namespace gram {

using executor::Past;

template <class R>
struct Places : Layout<R> {
  using Layout<R>::Layout;

  // Parts of `saved`: x W_0^T; x X^T, one row a row of x. A support set has them with its first call.
  std::int64_t z0() const { return this->behind_dz(); }
  std::int64_t products() const { return z0() + this->s.n * this->out; }
  std::int64_t products_row() const { return padded<R>(this->s.support); }
  std::int64_t saved() const { return products() + this->s.n * products_row(); }

  const R* dz_dot_of(const Tangent<R>& t) const {
    return this->identity() ? t.dy_dot : t.saved_dot + this->behind_z_dots();
  }
};

template <class R>
Sizes sizes(const void* shape) {
  const Places<R> l(shape);
  Sizes sizes{};
  sizes.y = l.s.n * l.out;
  sizes.rereads_y = !l.identity();
  sizes.saved = l.saved();
  sizes.saved_dot = l.behind_z_dots() + (l.identity() ? 0 : l.s.n * l.out);
  sizes.scratch = l.s.support * l.out;
  sizes.weights[0] = l.s.in * l.out;
  sizes.weights[1] = l.s.bias ? l.out : 0;
  return sizes;
}

// out [n, out_row] = a B^T of rows that lie `row` elements apart, in squares of dot products.
template <class R>
void row_products(const R* a, std::int64_t n, const R* b, std::int64_t m, std::int64_t row, R* out,
                  std::int64_t out_row) {
  constexpr std::int64_t edge = 4;
  const std::int64_t whole = row / width<R> * width<R>;
  for (std::int64_t i = 0; i < n; i += edge)
    for (std::int64_t j = 0; j < out_row; j += edge) {
      const R *left[edge], *right[edge];
      for (std::int64_t k = 0; k < edge; ++k) {  // at an edge the last row again
        left[k] = a + (i + k < n ? i + k : n - 1) * row;
        right[k] = b + (j + k < m ? j + k : m - 1) * row;
      }
      Vector<R> sums[edge][edge] = {};
      for (std::int64_t c = 0; c < whole; c += width<R>)
#pragma GCC unroll 4
        for (int k = 0; k < edge; ++k)
#pragma GCC unroll 4
          for (int o = 0; o < edge; ++o) sums[k][o] += load(left[k] + c) * load(right[o] + c);
#pragma GCC unroll 4
      for (int k = 0; k < edge; ++k)
#pragma GCC unroll 4
        for (int o = 0; o < edge; ++o) {
          if (i + k >= n || j + o >= out_row) continue;
          R total = sum<R>(sums[k][o]);
          for (std::int64_t c = whole; c < row; ++c) total += left[k][c] * right[o][c];
          out[(i + k) * out_row + j + o] = j + o < m ? total : R(0);
        }
    }
}

// The layer as it is called for so many rows.
inline Shape with_rows(const Shape& shape, std::int64_t rows) {
  Shape other = shape;
  other.n = rows;
  return other;
}

// out [support, out] = the sum of the steps' cotangents, or of their derivatives, each times its rate and `sign`.
template <class R>
void sum_of_steps(const Shape& shape, const Past<R>* steps, std::int64_t count, bool tangents, R sign, R* out) {
  const Shape of_support = with_rows(shape, shape.support);
  const Places<R> l(&of_support);
  const std::int64_t elements = l.s.n * l.out;
  for (std::int64_t k = 0; k < count; ++k) {
    const R* dz = tangents ? l.dz_dot_of(*steps[k].tangent) : l.dz_of(*steps[k].call);
    const R rate = sign * *steps[k].rate;
    for (std::int64_t i = 0; i < elements; i += width<R>)
      store(out + i, k == 0 ? rate * load(dz + i) : load(out + i) + rate * load(dz + i));
  }
}

// y += sign * (x X^T) c, c [support, out].
template <class R>
void add_products(const Places<R>& l, const R* products, const R* c, R sign, R* y) {
  const Term<R> term{products, l.products_row(), c, l.out, l.s.support};
  product(&term, 1, l.s.n, l.s.out, Result<R>{y, l.out, nullptr, y, -sign});
}

// The support set's layer: its first call's `saved` has the parts that never change. Other places than a query's.
template <class R>
const R* unchanging(const Primal<R>& p) {
  return p.taken > 0 ? p.past[0].call->saved : p.saved;
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R* scratch) {
  const Places<R> l(shape);
  if (l.s.asks || p.taken == 0) {
    const Term<R> term{p.x[0], l.x_row, p.w[0], l.weight_row(), l.s.in};
    product(&term, 1, l.s.n, l.s.out, Result<R>{p.saved + l.z0(), l.out});
    if (!l.s.asks || p.taken > 0) {
      const R* rows = l.s.asks ? p.past[0].call->x[0] : p.x[0];
      row_products(p.x[0], l.s.n, rows, l.s.support, l.s.in, p.saved + l.products(), l.products_row());
    }
  }
  const R* saved = l.s.asks ? p.saved : unchanging(p);
  for (std::int64_t i = 0; i < l.s.n; ++i)
    for (std::int64_t j = 0; j < l.out; j += width<R>) {
      const Vector<R> z0 = load(saved + l.z0() + i * l.out + j);
      store(p.y + i * l.out + j, l.s.bias ? z0 + load(p.w[1] + j) : z0);
    }
  if (p.taken > 0) {
    sum_of_steps(l.s, p.past, p.taken, false, R(1), scratch);
    add_products(l, saved + l.products(), scratch, R(-1), p.y);
  }
  activate<R>(l, p);
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R*) {
  const Places<R> l(shape);
  descend<R>(l, p);
  if (p.dw[1] != nullptr) to_bias<R>(l, l.dz_of(p), p.step, p.dw[1]);
}

// The direction is dz_q^T X_q of the query set, less the passed steps' dz_dot^T X, each times its rate.
template <class R>
void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
  const Places<R> l(shape);
  const Shape of_query = with_rows(l.s, l.s.query);
  const Places<R> q(&of_query);
  const Term<R> term{t.query->saved + q.products(), q.products_row(), q.dz_of(*t.query), l.out, l.s.query};
  turned_product(&term, 1, l.s.n, l.s.out, Result<R>{t.y_dot, l.out, l.s.bias ? t.w_dot[1] : nullptr});
  if (t.passed_steps > 0) {
    sum_of_steps(l.s, t.passed, t.passed_steps, true, R(1), scratch);
    add_products(l, unchanging(p) + l.products(), scratch, R(-1), t.y_dot);
  }
  activate_tangent<R>(l, p, t);
}

template <class R>
void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  const Places<R> l(shape);
  const R* dz_dot = descend_tangent<R>(l, p, t, t.saved_dot + l.behind_z_dots());
  if (t.dw_dot[1] != nullptr) to_bias<R>(l, dz_dot, t.step, t.dw_dot[1]);
}

template <class R>
void collect(const void* shape, const Primal<R>& query, bool adds, R* dw, R* scratch) {
  const Places<R> l(shape);
  Term<R> terms[2] = {{query.x[0], l.x_row, l.dz_of(query), l.out, l.s.n}};
  int count = 1;
  if (query.taken > 0 && query.past[0].tangent != nullptr) {
    sum_of_steps(l.s, query.past, query.taken, true, R(-1), scratch);
    terms[count++] = {query.past[0].call->x[0], l.x_row, scratch, l.out, l.s.support};
  }
  turned_product(terms, count, l.s.in, l.s.out, Result<R>{dw, l.out, nullptr, adds ? dw : nullptr, R(-1)});
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,    sizes<R>,   pack<R>,             unpack<R>, forward<R>,
                                 backward<R>, tangent<R>, tangent_backward<R>, nullptr,   true,
                                 collect<R>};

}  // namespace gram
}  // namespace
}  // namespace fastmeta::linear_block::FASTMETA_ISA
