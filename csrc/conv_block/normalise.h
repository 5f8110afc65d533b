// Normalisation by the statistics of a batch or by running ones, and its derivatives, as coefficients per channel.
//
// u = (z - mean) a + b feeds the activation; with a = gamma / s it is batch norm, with mean = 0 and a = 1 only a bias.
// Running statistics do not take the convolution's bias away with the mean: it is taken from theirs.
// All other maps are such affine forms too, so one set of loops serves both.
#pragma once

#include "geometry.h"

namespace fastmeta::conv_block {
namespace {

// Mean and sum of squares about it, merged piece by piece: nothing is lost where the mean is large.
template <class R>
struct Moments {
  typedef Vector<R> V;
  R *mean, *squares;

  // Those of one piece.
  void find(const R* z, std::int64_t rows, std::int64_t channels) const {
    in_blocks<R>(channels, [&](auto many, std::int64_t c) {
      constexpr int n = decltype(many)::value;
      V m[n], s[n];
      sum_rows<n>(z + c, rows, channels, m, [](int, V v) { return v; });
      for (V& x : m) x *= splat<R>(R(1) / static_cast<R>(rows));
      sum_rows<n>(z + c, rows, channels, s, [&](int j, V v) { return (v - m[j]) * (v - m[j]); });
      for (int j = 0; j < n; ++j) {
        store(mean + c + j * width<R>, m[j]);
        store(squares + c + j * width<R>, s[j]);
      }
    });
  }

  // Takes in those of `rows` more beside `count`.
  void include(const Moments& piece, std::int64_t count, std::int64_t rows, std::int64_t channels) const {
    const R share = static_cast<R>(rows) / static_cast<R>(count + rows);
    for (std::int64_t c = 0; c < channels; c += width<R>) {
      const V before = count == 0 ? V{} : load(mean + c), s = load(piece.squares + c);
      const V d = load(piece.mean + c) - before;
      store(mean + c, count == 0 ? load(piece.mean + c) : before + d * splat<R>(share));
      store(squares + c, count == 0 ? s : load(squares + c) + s + d * d * splat<R>(share * static_cast<R>(count)));
    }
  }

  // A few rows at a time: rounding grows with neither the rows nor their square root.
  template <int n, class Term>
  static FASTMETA_INLINE void sum_rows(const R* z, std::int64_t rows, std::int64_t stride, V* total, Term term) {
    for (int j = 0; j < n; ++j) total[j] = V{};
    for (std::int64_t first = 0; first < rows; first += 32) {
      const std::int64_t last = minimum(rows, first + 32);
      V part[2][n] = {};
      for (std::int64_t r = first; r < last; r += 2)
#pragma GCC unroll 4
        for (int j = 0; j < n; ++j) {
          part[0][j] += term(j, load(z + r * stride + j * width<R>));
          if (r + 1 < last) part[1][j] += term(j, load(z + (r + 1) * stride + j * width<R>));
        }
      for (int j = 0; j < n; ++j) total[j] += part[0][j] + part[1][j];
    }
  }
};

// Coefficients per channel; each points to [co].
template <class R>
struct Affine {
  R *mean, *a, *b;
};
// u_dot = (z_dot - mean_dot) a + (z - mean) e + f
template <class R>
struct AffineTangent {
  R *mean_dot, *e, *f;
};
// dz     = dv a + k0 + (z - mean) k1
// dz_dot = dv_dot a + dv a_dot + k0_dot + (z - mean) k1_dot + (z_dot - mean_dot) k2_dot
template <class R>
struct Cotangent {
  R *k0, *k1;
};
template <class R>
struct CotangentDot {
  R *a_dot, *k0, *k1, *k2;
};

// What forward and backward find, kept for the tangents. dg is the gradient of gamma: the sum of dv times normalised z.
template <class R>
struct Statistics {
  R *mean, *inverse, *db, *dg;
  explicit Statistics(const Geometry<R>& g, Arena<R>& arena)
      : mean(arena.take(g.co)), inverse(arena.take(g.co)), db(arena.take(g.co)), dg(arena.take(g.co)) {}
};

// ... and what tangent finds: means of z_dot and of z_dot times normalised z.
template <class R>
struct StatisticsDot {
  R *mean, *spread;
  explicit StatisticsDot(const Geometry<R>& g, Arena<R>& arena) : mean(arena.take(g.co)), spread(arena.take(g.co)) {}
};

template <class R>
R entry(const R* p, std::int64_t i, R otherwise) {
  return p == nullptr ? otherwise : p[i];
}

// From mean and sum of squares (in `inverse`); padding stays finite whatever eps is.
template <class R>
void finish_statistics(const Shape& s, const Geometry<R>& g, const Statistics<R>& st) {
  for (std::int64_t c = 0; c < g.co; ++c) {
    const R variance = st.inverse[c] / static_cast<R>(g.count());
    st.inverse[c] = c < g.out ? R(1) / square_root(variance + static_cast<R>(s.eps)) : R(0);
  }
}

template <class R>
void running_statistics(const Shape& s, const Geometry<R>& g, const R* const* w, const Statistics<R>& st) {
  for (std::int64_t c = 0; c < g.co; ++c) {
    st.mean[c] = w[4][c] - (s.bias ? w[1][c] : R(0));
    st.inverse[c] = c < g.out ? R(1) / square_root(w[5][c] + static_cast<R>(s.eps)) : R(0);
  }
}

// `w` are the weights of the shape.
template <class R>
void coefficients(const Shape& s, const Geometry<R>& g, const Statistics<R>& st, const R* const* w,
                  const Affine<R>& k) {
  const bool normalises = s.norm != Norm::none;
  for (std::int64_t c = 0; c < g.co; ++c) {
    const R one = c < g.out ? R(1) : R(0);
    k.mean[c] = normalises ? st.mean[c] : R(0);
    k.a[c] = normalises ? st.inverse[c] * (s.affine ? w[2][c] : one) : one;
    k.b[c] = normalises ? (s.affine ? w[3][c] : R(0)) : (s.bias ? w[1][c] : R(0));
  }
}

template <class R>
void coefficients_tangent(const Shape& s, const Geometry<R>& g, const Statistics<R>& st, const StatisticsDot<R>& dot,
                          const Affine<R>& k, const R* const* w_dot, const AffineTangent<R>& t) {
  const bool normalises = s.norm != Norm::none;
  for (std::int64_t c = 0; c < g.co; ++c) {
    const R gamma_dot = normalises && s.affine ? entry(w_dot[2], c, R(0)) : R(0);
    t.mean_dot[c] = normalises ? dot.mean[c] : R(0);
    t.e[c] = normalises ? st.inverse[c] * (gamma_dot - k.a[c] * dot.spread[c]) : R(0);
    t.f[c] = normalises ? (s.affine ? entry(w_dot[3], c, R(0)) : R(0)) : (s.bias ? entry(w_dot[1], c, R(0)) : R(0));
  }
}

template <class R>
void coefficients_cotangent(const Shape& s, const Geometry<R>& g, const Statistics<R>& st, const Affine<R>& k,
                            const Cotangent<R>& d) {
  const R share = s.norm == Norm::batch ? R(1) / static_cast<R>(g.count()) : R(0);
  for (std::int64_t c = 0; c < g.co; ++c) {
    d.k0[c] = -k.a[c] * st.db[c] * share;
    d.k1[c] = s.norm == Norm::batch ? -k.a[c] * st.dg[c] * share * st.inverse[c] : R(0);
  }
}

// db_dot and dg_dot are the tangents of db and dg. In e of `t` is already the tangent of a.
template <class R>
void coefficients_cotangent_dot(const Shape& s, const Geometry<R>& g, const Statistics<R>& st,
                                const StatisticsDot<R>& dot, const Affine<R>& k, const AffineTangent<R>& t,
                                const R* db_dot, const R* dg_dot, const CotangentDot<R>& d) {
  const bool batch = s.norm == Norm::batch;
  const R share = batch ? R(1) / static_cast<R>(g.count()) : R(0);
  for (std::int64_t c = 0; c < g.co; ++c) {
    const R inverse = batch ? st.inverse[c] : R(0), dg = batch ? st.dg[c] : R(0), spread = batch ? dot.spread[c] : R(0);
    d.a_dot[c] = t.e[c];
    d.k0[c] = -(t.e[c] * st.db[c] + k.a[c] * db_dot[c]) * share;
    d.k1[c] = (k.a[c] * dg * inverse * spread - (t.e[c] * dg + k.a[c] * dg_dot[c])) * share * inverse;
    d.k2[c] = -k.a[c] * dg * share * inverse;
  }
}

}  // namespace
}  // namespace fastmeta::conv_block
