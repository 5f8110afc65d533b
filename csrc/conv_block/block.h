// The four maps of a block whose convolution's result is kept: any shape.
#pragma once

#include "passes.h"
#include "products.h"
#include "weights.h"

namespace fastmeta::conv_block {
namespace {

template <class R>
struct Saved {
  Statistics<R> statistics;
  std::uint8_t* codes;
  R* z;

  Saved(const Shape& s, const Geometry<R>& g, Arena<R>& arena) : statistics(g, arena), codes(nullptr) {
    if (s.pool == Pool::max) codes = arena.template take_as<std::uint8_t>(g.n * g.pooled());
    z = arena.take(g.n * g.result());
  }
  std::uint8_t* codes_of(const Geometry<R>& g, std::int64_t image) const {
    return codes == nullptr ? nullptr : codes + image * g.pooled();
  }
};

template <class R>
struct SavedDot {
  StatisticsDot<R> statistics;
  R* z_dot;

  SavedDot(const Geometry<R>& g, Arena<R>& arena) : statistics(g, arena), z_dot(arena.take(g.n * g.result())) {}
};

template <class R>
struct Coefficients {
  Affine<R> affine;
  AffineTangent<R> tangent;
  Cotangent<R> cotangent;
  CotangentDot<R> cotangent_dot;
  R *db_dot, *dg_dot;
  double *sum, *product;

  Coefficients(const Geometry<R>& g, Arena<R>& arena) {
    R** const all[] = {&affine.mean,       &affine.a,         &affine.b,         &tangent.mean_dot, &tangent.e,
                       &tangent.f,         &cotangent.k0,     &cotangent.k1,     &cotangent_dot.a_dot,
                       &cotangent_dot.k0,  &cotangent_dot.k1, &cotangent_dot.k2, &db_dot,           &dg_dot};
    for (R** p : all) *p = arena.take(g.co);
    sum = arena.template take_as<double>(g.co);
    product = arena.template take_as<double>(g.co);
    if (arena.base == nullptr) return;
    fill_zero(sum, g.co);
    fill_zero(product, g.co);
  }
};

// Scratch of each map.
template <class R>
struct ForwardScratch {
  Coefficients<R> k;
  ForwardProduct<R> product;
  ForwardScratch(const Shape& s, const Geometry<R>& g, Arena<R>& arena) : k(g, arena), product(s, g, arena) {}
};
template <class R>
struct TangentScratch {
  Coefficients<R> k;
  TangentProduct<R> product;
  TangentScratch(const Shape& s, const Geometry<R>& g, Arena<R>& arena) : k(g, arena), product(s, g, arena) {}
};
template <class R>
struct GradientScratch {
  Coefficients<R> k;
  GradientProduct<R> product;
  R *dz, *dz_dot;
  GradientScratch(const Shape& s, const Geometry<R>& g, bool tangent, Arena<R>& arena)
      : k(g, arena), product(s, g, tangent ? 2 : 1, arena), dz(arena.take(product.group() * g.result())),
        dz_dot(tangent ? arena.take(product.group() * g.result()) : nullptr) {}
};

template <class R>
executor::Sizes block_sizes(const Shape& s, const Geometry<R>& g) {
  executor::Sizes sizes{};
  sizes.y = g.n * g.pooled();
  Arena<R> saved(nullptr), saved_dot(nullptr), forward(nullptr), tangent(nullptr), gradient(nullptr);
  Saved<R>(s, g, saved);
  SavedDot<R>(g, saved_dot);
  ForwardScratch<R>(s, g, forward);
  TangentScratch<R>(s, g, tangent);
  GradientScratch<R>(s, g, true, gradient);
  sizes.saved = saved.used;
  sizes.saved_dot = saved_dot.used;
  sizes.scratch = maximum(forward.used, maximum(tangent.used, gradient.used));
  return sizes;
}

template <class R, class A>
void block_forward(const Shape& s, const Geometry<R>& g, const executor::Primal<R>& p, R* memory) {
  Arena<R> arena(memory), kept(p.saved);
  ForwardScratch<R> scratch(s, g, arena);
  const Saved<R> saved(s, g, kept);
  scratch.product.prepare(p.w[0]);
  Moments<R> moments{saved.statistics.mean, saved.statistics.inverse};
  for (std::int64_t first = 0; first < g.n; first += scratch.product.group()) {
    const std::int64_t images = minimum(scratch.product.group(), g.n - first);
    R* z = saved.z + first * g.result();
    scratch.product.apply(p.x[0], first, images, z);
    if (s.norm == Norm::batch) moments.include(z, images * g.h * g.w, g.co);
  }
  if (s.norm == Norm::batch) finish_statistics(s, g, saved.statistics);
  Passes<R, A> passes(s, g);
  passes.k = scratch.k.affine;
  coefficients(s, g, saved.statistics, p.w, passes.k);
  for (std::int64_t i = 0; i < g.n; ++i)
    passes.forward(saved.z + i * g.result(), p.y + i * g.pooled(), saved.codes_of(g, i));
}

template <class R, class A>
void block_backward(const Shape& s, const Geometry<R>& g, const executor::Primal<R>& p, R* memory) {
  Arena<R> arena(memory), kept(p.saved);
  GradientScratch<R> scratch(s, g, false, arena);
  const Saved<R> saved(s, g, kept);
  const Statistics<R>& st = saved.statistics;
  const Coefficients<R>& k = scratch.k;
  const bool batch = s.norm == Norm::batch;
  Passes<R, A> passes(s, g);
  passes.k = k.affine;
  coefficients(s, g, st, p.w, passes.k);

  for (std::int64_t i = 0; i < g.n; ++i)
    passes.sums({p.dy + i * g.pooled(), nullptr, saved.codes_of(g, i), scratch.dz, nullptr}, saved.z + i * g.result(), k.sum,
                k.product);
  for (std::int64_t c = 0; c < g.co; ++c) {
    st.db[c] = static_cast<R>(k.sum[c]);
    st.dg[c] = batch ? static_cast<R>(k.product[c] * static_cast<double>(st.inverse[c])) : R(0);
    if (p.dw[1] != nullptr) p.dw[1][c] = batch ? R(0) : st.db[c];
    if (p.dw[2] != nullptr) p.dw[2][c] = st.dg[c];
    if (p.dw[3] != nullptr) p.dw[3][c] = st.db[c];
  }
  if (p.dx[0] == nullptr && p.dw[0] == nullptr) return;

  coefficients_cotangent(s, g, st, k.affine, k.cotangent);
  if (p.dx[0] != nullptr) scratch.product.prepare(p.w[0], 0);
  for (std::int64_t first = 0; first < g.n; first += scratch.product.group()) {
    const std::int64_t images = minimum(scratch.product.group(), g.n - first);
    for (std::int64_t i = first; i < first + images; ++i) {
      R* dz = scratch.dz + (i - first) * g.result();
      passes.backward({p.dy + i * g.pooled(), nullptr, saved.codes_of(g, i), dz, nullptr}, k.cotangent,
                      saved.z + i * g.result(), dz);
    }
    const typename GradientProduct<R>::Term term{scratch.dz, 0, p.x[0]};
    scratch.product.apply(&term, 1, first, images, p.dx[0], p.dw[0]);
  }
  scratch.product.finish(p.dw[0]);
  clear_between_groups(g, p.dw[0]);
}

template <class R, class A>
void block_tangent(const Shape& s, const Geometry<R>& g, const executor::Primal<R>& p, const executor::Tangent<R>& d,
                   R* memory) {
  Arena<R> arena(memory), kept(p.saved), kept_dot(d.saved_dot);
  TangentScratch<R> scratch(s, g, arena);
  const Saved<R> saved(s, g, kept);
  const SavedDot<R> dot(g, kept_dot);
  const Coefficients<R>& k = scratch.k;

  typename TangentProduct<R>::Term terms[2];
  int count = 0;
  if (d.x_dot[0] != nullptr) terms[count++] = {d.x_dot[0], p.w[0]};
  if (d.w_dot[0] != nullptr) terms[count++] = {p.x[0], d.w_dot[0]};
  scratch.product.apply(terms, count, dot.z_dot);

  Passes<R, A> passes(s, g);
  passes.k = k.affine;
  passes.t = k.tangent;
  coefficients(s, g, saved.statistics, p.w, k.affine);
  if (s.norm == Norm::batch) {
    for (std::int64_t i = 0; i < g.n; ++i)
      passes.sums_dot(saved.z + i * g.result(), dot.z_dot + i * g.result(), k.sum, k.product);
    const double share = 1 / static_cast<double>(g.count());
    for (std::int64_t c = 0; c < g.co; ++c) {
      dot.statistics.mean[c] = static_cast<R>(k.sum[c] * share);
      dot.statistics.spread[c] = static_cast<R>(k.product[c] * share) * saved.statistics.inverse[c];
    }
  }
  coefficients_tangent(s, g, saved.statistics, dot.statistics, k.affine, d.w_dot, k.tangent);
  for (std::int64_t i = 0; i < g.n; ++i)
    passes.tangent(saved.z + i * g.result(), dot.z_dot + i * g.result(), saved.codes_of(g, i), d.y_dot + i * g.pooled());
}

template <class R, class A>
void block_tangent_backward(const Shape& s, const Geometry<R>& g, const executor::Primal<R>& p,
                            const executor::Tangent<R>& d, R* memory) {
  Arena<R> arena(memory), kept(p.saved), kept_dot(d.saved_dot);
  GradientScratch<R> scratch(s, g, true, arena);
  const Saved<R> saved(s, g, kept);
  const SavedDot<R> dot(g, kept_dot);
  const Statistics<R>& st = saved.statistics;
  const Coefficients<R>& k = scratch.k;
  const bool batch = s.norm == Norm::batch;
  Passes<R, A> passes(s, g);
  passes.k = k.affine;
  passes.t = k.tangent;
  coefficients(s, g, st, p.w, k.affine);
  coefficients_tangent(s, g, st, dot.statistics, k.affine, d.w_dot, k.tangent);
  const auto cotangents = [&](std::int64_t i, R* memory, R* memory_dot) {
    return Cotangents<R>{p.dy + i * g.pooled(), d.dy_dot + i * g.pooled(), saved.codes_of(g, i), memory, memory_dot};
  };

  for (std::int64_t i = 0; i < g.n; ++i)
    passes.sums_tangent_backward(cotangents(i, scratch.dz, scratch.dz_dot), saved.z + i * g.result(),
                                 dot.z_dot + i * g.result(), k.sum, k.product);
  for (std::int64_t c = 0; c < g.co; ++c) {
    k.db_dot[c] = static_cast<R>(k.sum[c]);
    k.dg_dot[c] = batch ? st.inverse[c] * (static_cast<R>(k.product[c]) - dot.statistics.spread[c] * st.dg[c]) : R(0);
    if (d.dw_dot[1] != nullptr) d.dw_dot[1][c] = batch ? R(0) : k.db_dot[c];
    if (d.dw_dot[2] != nullptr) d.dw_dot[2][c] = k.dg_dot[c];
    if (d.dw_dot[3] != nullptr) d.dw_dot[3][c] = k.db_dot[c];
  }
  R *dx_dot = d.dx_dot[0], *dw_dot = d.dw_dot[0];
  if (dx_dot == nullptr && dw_dot == nullptr) return;

  coefficients_cotangent(s, g, st, k.affine, k.cotangent);
  coefficients_cotangent_dot(s, g, st, dot.statistics, k.affine, k.tangent, k.db_dot, k.dg_dot,
                             k.cotangent_dot);
  const bool weight_varies = d.w_dot[0] != nullptr;
  if (dx_dot != nullptr) {
    scratch.product.prepare(p.w[0], 0);
    if (weight_varies) scratch.product.prepare(d.w_dot[0], 1);
  }
  for (std::int64_t first = 0; first < g.n; first += scratch.product.group()) {
    const std::int64_t images = minimum(scratch.product.group(), g.n - first);
    for (std::int64_t i = first; i < first + images; ++i) {
      R *dz = scratch.dz + (i - first) * g.result(), *dz_dot = scratch.dz_dot + (i - first) * g.result();
      passes.tangent_backward(cotangents(i, dz, dz_dot), k.cotangent, k.cotangent_dot, saved.z + i * g.result(),
                              dot.z_dot + i * g.result(), dz, dz_dot);
    }
    const typename GradientProduct<R>::Term terms[] = {{scratch.dz_dot, 0, p.x[0]},
                                                       {scratch.dz, weight_varies ? 1 : -1, d.x_dot[0]}};
    scratch.product.apply(terms, 2, first, images, dx_dot, dw_dot);
  }
  scratch.product.finish(dw_dot);
  clear_between_groups(g, dw_dot);
}

}  // namespace
}  // namespace fastmeta::conv_block
