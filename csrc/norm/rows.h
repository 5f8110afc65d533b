// Layer norm of rows: what cpu.cpp says of groups, where each row is one and has whole vectors. Its statistics are two
// numbers, and nothing lies by channel but the weights and their gradients.
#pragma once

#include "groups.h"

namespace fastmeta::norm {
namespace {

template <class R>
bool has_rows(const Layout<R>& l) {
  return l.s.pixels == 1 && l.s.groups == 1 && !l.s.running && l.co == l.s.channels;
}

// Sums over a row of what term(c) gives at each vector: a few vectors in R, those in double.
template <class R, int count, class Term>
FASTMETA_INLINE void sum_row(std::int64_t channels, double (&sums)[count], Term term) {
  constexpr std::int64_t few = 8 * width<R>;
  for (double& sum : sums) sum = 0;
  for (std::int64_t first = 0; first < channels; first += few) {
    Terms<R, count> part{};
    for (std::int64_t c = first; c < minimum(channels, first + few); c += width<R>) {
      const Terms<R, count> here = term(c);
      for (int i = 0; i < count; ++i) part.of[i] += here.of[i];
    }
    for (int i = 0; i < count; ++i) sums[i] += static_cast<double>(sum<R>(part.of[i]));
  }
}

// Gradients of weight and bias: rows are added in R, a few of them in double, to scratch that a map begins with zeros.
template <class R>
struct WeightSums {
  static constexpr std::int64_t few = 32;
  const Scratch<R>& k;
  R *const weight, *const bias;

  explicit WeightSums(const Scratch<R>& scratch) : k(scratch), weight(k.d_mean_dot), bias(k.d_spread_dot) {}

  FASTMETA_INLINE void add(std::int64_t c, Vector<R> to_weight, Vector<R> to_bias) const {
    store(weight + c, load(weight + c) + to_weight);
    store(bias + c, load(bias + c) + to_bias);
  }

  // Behind a row.
  void pass(std::int64_t row) const {
    if ((row + 1) % few != 0 && row + 1 < k.l.samples) return;
    for (std::int64_t c = 0; c < k.l.co; c += width<R>) {
      accumulate<R>(k.totals[0] + c, load(weight + c));
      accumulate<R>(k.totals[1] + c, load(bias + c));
      store(weight + c, Vector<R>{});
      store(bias + c, Vector<R>{});
    }
  }
};

// One row's mean and 1 / s, and its weights.
template <class R>
struct Row {
  typedef Vector<R> V;
  const R *z, *weight, *bias;
  R mean, inverse;

  Row(const Scratch<R>& k, const Primal<R>& p, std::int64_t i)
      : z(p.x[0] + i * k.l.size), weight(k.l.s.weight ? p.w[0] : k.ones), bias(k.l.s.bias ? p.w[1] : k.zeros) {}

  void take(const Saved<R>& saved) { mean = *saved.mean(), inverse = *saved.inverse(); }
  FASTMETA_INLINE V centred(std::int64_t c) const { return load(z + c) - mean; }
  FASTMETA_INLINE V u(std::int64_t c) const { return centred(c) * (inverse * load(weight + c)) + load(bias + c); }
};

template <class R, class C>
void forward_rows(const Layout<R>& l, const Primal<R>& p, R* scratch, C curve) {
  const Scratch<R> k(l, scratch);
  const R slope = static_cast<R>(l.s.slope);
  for (std::int64_t i = 0; i < l.samples; ++i) {
    const Saved<R> saved(l, p.saved, i);
    Row<R> row(k, p, i);
    double sums[1];
    sum_row<R>(l.co, sums, [&](std::int64_t c) { return Terms<R, 1>{{load(row.z + c)}}; });
    *saved.mean() = row.mean = static_cast<R>(sums[0] * l.share);
    sum_row<R>(l.co, sums, [&](std::int64_t c) { return Terms<R, 1>{{row.centred(c) * row.centred(c)}}; });
    *saved.inverse() = row.inverse = static_cast<R>(1 / square_root(sums[0] * l.share + l.s.eps));
    R* y = p.y + i * l.size;
    for (std::int64_t c = 0; c < l.co; c += width<R>) store(y + c, curve.value(row.u(c), slope));
  }
}

template <class R, class C>
void backward_rows(const Layout<R>& l, const Primal<R>& p, R* scratch, C curve) {
  typedef Vector<R> V;
  const Scratch<R> k(l, scratch);
  const WeightSums<R> totals(k);
  const R slope = static_cast<R>(l.s.slope);
  for (std::int64_t i = 0; i < l.samples; ++i) {
    const R *y = p.y + i * l.size, *dy = p.dy + i * l.size;
    const Saved<R> saved(l, p.saved, i);
    Row<R> row(k, p, i);
    row.take(saved);
    const auto du_at = [&](std::int64_t c) { return curve.slope(load(y + c), row.u(c), slope) * load(dy + c); };
    double sums[2];
    sum_row<R>(l.co, sums, [&](std::int64_t c) {
      const V d = load(row.weight + c) * du_at(c);
      return Terms<R, 2>{{d, d * row.centred(c)}};
    });
    const R m = *saved.d_mean() = static_cast<R>(sums[0] * l.share);
    const R n = *saved.d_spread() = static_cast<R>(sums[1] * l.share * static_cast<double>(row.inverse));
    const R r = row.inverse, k0 = r * m, k1 = r * r * n;
    R* dz = p.dx[0] == nullptr ? nullptr : p.dx[0] + i * l.size;
    for (std::int64_t c = 0; c < l.co; c += width<R>) {
      const V du = du_at(c), centred = row.centred(c);
      totals.add(c, du * centred * r, du);
      if (dz != nullptr) store(dz + c, du * (r * load(row.weight + c)) - (k0 + centred * k1));
    }
    totals.pass(i);
  }
  k.store_totals(p.dw);
}

// A direction's part of a row.
template <class R>
struct RowDot {
  typedef Vector<R> V;
  const R *z_dot, *weight_dot, *bias_dot;  // z_dot: null for zero
  R mean, spread;

  RowDot(const Scratch<R>& k, const Tangent<R>& t, std::int64_t i)
      : z_dot(t.x_dot[0] == nullptr ? nullptr : t.x_dot[0] + i * k.l.size),
        weight_dot(t.w_dot[0] != nullptr ? t.w_dot[0] : k.zeros),
        bias_dot(t.w_dot[1] != nullptr ? t.w_dot[1] : k.zeros) {}

  void take(const SavedDot<R>& saved) { mean = *saved.mean(), spread = *saved.spread(); }
  FASTMETA_INLINE V z(std::int64_t c) const { return z_dot == nullptr ? V{} : load(z_dot + c); }
  FASTMETA_INLINE V centred(std::int64_t c) const { return z(c) - mean; }
  FASTMETA_INLINE V e(const Row<R>& row, std::int64_t c) const {
    return row.inverse * (load(weight_dot + c) - row.inverse * spread * load(row.weight + c));
  }
  FASTMETA_INLINE V u(const Row<R>& row, std::int64_t c) const {
    return centred(c) * (row.inverse * load(row.weight + c)) + (row.centred(c) * e(row, c) + load(bias_dot + c));
  }
};

template <class R, class C>
void tangent_rows(const Layout<R>& l, const Primal<R>& p, const Tangent<R>& t, R* scratch, C curve) {
  const Scratch<R> k(l, scratch);
  const R slope = static_cast<R>(l.s.slope);
  for (std::int64_t i = 0; i < l.samples; ++i) {
    Row<R> row(k, p, i);
    row.take(Saved<R>(l, p.saved, i));
    RowDot<R> turn(k, t, i);
    const SavedDot<R> dot(l, t.saved_dot, i);
    double sums[2];
    sum_row<R>(l.co, sums, [&](std::int64_t c) { return Terms<R, 2>{{turn.z(c), turn.z(c) * row.centred(c)}}; });
    *dot.mean() = turn.mean = static_cast<R>(sums[0] * l.share);
    *dot.spread() = turn.spread = static_cast<R>(sums[1] * l.share * static_cast<double>(row.inverse));
    const R* y = p.y + i * l.size;
    R* y_dot = t.y_dot + i * l.size;
    for (std::int64_t c = 0; c < l.co; c += width<R>)
      store(y_dot + c, curve.slope(load(y + c), row.u(c), slope) * turn.u(row, c));
  }
}

template <class R, class C>
void tangent_backward_rows(const Layout<R>& l, const Primal<R>& p, const Tangent<R>& t, R* scratch, C curve) {
  typedef Vector<R> V;
  const Scratch<R> k(l, scratch);
  const WeightSums<R> totals(k);
  const R slope = static_cast<R>(l.s.slope);
  for (std::int64_t i = 0; i < l.samples; ++i) {
    const R *y = p.y + i * l.size, *dy = p.dy + i * l.size, *dy_dot = t.dy_dot + i * l.size;
    const Saved<R> saved(l, p.saved, i);
    Row<R> row(k, p, i);
    row.take(saved);
    RowDot<R> turn(k, t, i);
    turn.take(SavedDot<R>(l, t.saved_dot, i));
    const auto du_at = [&](std::int64_t c) {
      const V f = load(y + c), u = row.u(c), s = curve.slope(f, u, slope), d = load(dy + c);
      Both<R> du{s * d, s * load(dy_dot + c)};
      if constexpr (C::bends) du.dot += curve.bend(f, u) * turn.u(row, c) * d;
      return du;
    };
    double sums[2];
    sum_row<R>(l.co, sums, [&](std::int64_t c) {
      const auto [du, du_dot] = du_at(c);
      const V w = load(row.weight + c), centred = row.centred(c), d_dot = load(turn.weight_dot + c) * du + w * du_dot;
      return Terms<R, 2>{{d_dot, d_dot * centred + w * du * turn.centred(c)}};
    });
    const R r = row.inverse, m = *saved.d_mean(), n = *saved.d_spread(), tr = turn.spread * r;
    const R m_dot = static_cast<R>(sums[0] * l.share);
    const R n_dot = static_cast<R>(static_cast<double>(r) * (sums[1] * l.share - static_cast<double>(turn.spread) *
                                                                                     static_cast<double>(n)));
    const R k0 = r * (tr * m - m_dot), k1 = r * r * (2 * tr * n - n_dot), k2 = r * r * n;
    R* dz_dot = t.dx_dot[0] == nullptr ? nullptr : t.dx_dot[0] + i * l.size;
    for (std::int64_t c = 0; c < l.co; c += width<R>) {
      const auto [du, du_dot] = du_at(c);
      const V centred = row.centred(c), centred_dot = turn.centred(c);
      totals.add(c, r * (du_dot * centred + du * centred_dot - tr * du * centred), du_dot);
      if (dz_dot == nullptr) continue;
      store(dz_dot + c, du_dot * (r * load(row.weight + c)) + du * turn.e(row, c) + (k0 + centred * k1) -
                            centred_dot * k2);
    }
    totals.pass(i);
  }
  k.store_totals(t.dw_dot);
}

}  // namespace
}  // namespace fastmeta::norm
