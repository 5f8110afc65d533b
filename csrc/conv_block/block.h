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
    if (s.pool.kind == Pool::max) codes = arena.template take_as<std::uint8_t>(g.n * g.pooled());
    z = arena.take(g.n * g.result());
  }
  std::uint8_t* codes_at(std::int64_t y) const { return codes == nullptr ? nullptr : codes + y; }
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

  Coefficients(const Geometry<R>& g, Arena<R>& common) {
    R** const all[] = {&affine.mean,       &affine.a,         &affine.b,         &tangent.mean_dot, &tangent.e,
                       &tangent.f,         &cotangent.k0,     &cotangent.k1,     &cotangent_dot.a_dot,
                       &cotangent_dot.k0,  &cotangent_dot.k1, &cotangent_dot.k2, &db_dot,           &dg_dot};
    for (R** p : all) *p = common.take(g.co);
  }
};

// Two sums per channel over all bands, made of those of parts.
template <class R>
struct ChannelSums {
  double *sum, *product;  // [parts, co]

  ChannelSums(const Shape& s, const Geometry<R>& g, Arena<R>& common)
      : sum(common.template take_as<double>(Bands<R>(s, g).parts() * g.co)),
        product(common.template take_as<double>(Bands<R>(s, g).parts() * g.co)) {}

  // visit(band, seat, sum, product) adds what the band has to sums.
  template <class Visit>
  void find(const Geometry<R>& g, const Bands<R>& bands, int threads, Visit visit) const {
    const std::int64_t parts = bands.parts(), count = bands.count();
    parallel_for(parts, threads, [&](std::int64_t first, std::int64_t last, int seat) {
      for (std::int64_t k = first; k < last; ++k) {
        fill_zero(sum + k * g.co, g.co);
        fill_zero(product + k * g.co, g.co);
        for (std::int64_t b = count * k / parts; b < count * (k + 1) / parts; ++b)
          visit(bands[b], seat, sum + k * g.co, product + k * g.co);
      }
    });
    for (std::int64_t k = 1; k < parts; ++k)
      for (std::int64_t c = 0; c < g.co; ++c) {
        sum[c] += sum[k * g.co + c];
        product[c] += product[k * g.co + c];
      }
  }
};

// use(band) for the bands from `first` to `last`.
template <class R, class Use>
void for_each_band(const Bands<R>& bands, std::int64_t first, std::int64_t last, int threads, Use use) {
  parallel_for(last - first, threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t b = begin; b < end; ++b) use(bands[first + b]);
  });
}

// Scratch of each map, as one thread sees it.
template <class R>
struct ForwardScratch {
  Coefficients<R> k;
  ForwardProduct<R> product;
  R* moments;  // [pieces, 2, co]
  ForwardScratch(const Shape& s, const Geometry<R>& g, Arena<R>& common, Arena<R>& own)
      : k(g, common), product(s, g, common, own), moments(common.take(product.pieces() * 2 * g.co)) {}

  Moments<R> moments_of(const Geometry<R>& g, std::int64_t piece) const {
    return {moments + 2 * piece * g.co, moments + (2 * piece + 1) * g.co};
  }
};
template <class R>
struct TangentScratch {
  Coefficients<R> k;
  ChannelSums<R> sums;
  TangentProduct<R> product;
  TangentScratch(const Shape& s, const Geometry<R>& g, Arena<R>& common, Arena<R>& own)
      : k(g, common), sums(s, g, common), product(s, g, common, own) {}
};
template <class R, int terms>
struct GradientScratch {
  Coefficients<R> k;
  ChannelSums<R> sums;
  GradientProduct<R> product;
  R *dz, *dz_dot;
  GradientScratch(const Shape& s, const Geometry<R>& g, Arena<R>& common, Arena<R>& own)
      : k(g, common), sums(s, g, common), product(s, g, terms, common, own), dz(own.take(product.group() * g.result())),
        dz_dot(terms > 1 ? own.take(product.group() * g.result()) : nullptr) {}
};

template <class R, int terms>
struct GradientTerms {
  static constexpr int count = terms;
  typename GradientProduct<R>::Term of[terms];
};

// Calls make(what a thread sees) once for each of them.
template <class Scratch, class R, class Make>
void for_each_seat(const Shape& s, const Geometry<R>& g, const Room<R>& room, Make make) {
  for (int seat = 0; seat < room.threads; ++seat) make(room.template at<Scratch>(seat, s, g));
}

// dx and dw from cotangents of z, made a group of images at a time: make(own, band, its place in the group) writes
// those of a band, terms_of(own) says what they are multiplied with.
template <class Scratch, class R, class Make, class TermsOf>
void pass_back(const Shape& s, const Geometry<R>& g, const Room<R>& room, R* dx, R* dw, Make make, TermsOf terms_of) {
  Scratch scratch = room.template at<Scratch>(0, s, g);
  const Bands<R> bands(s, g);
  for_each_seat<Scratch>(s, g, room, [&](Scratch own) { own.product.prepare_own(dx != nullptr); });
  scratch.product.for_each_chunk(room.threads, [&](std::int64_t chunk, std::int64_t begin, std::int64_t end, int seat,
                                                   int threads) {
    Scratch own = room.template at<Scratch>(seat, s, g);
    for (std::int64_t first = begin; first < end; first += own.product.group()) {
      const std::int64_t images = minimum(own.product.group(), end - first);
      for_each_band(bands, first * bands.each, (first + images) * bands.each, threads,
                    [&](const Band<R>& b) { make(own, b, b.z - first * g.result()); });
      const auto terms = terms_of(own);
      own.product.apply(terms.of, terms.count, chunk, first, images, dx, dw, threads);
    }
  });
  scratch.product.finish(dw, room.threads);
  clear_between_groups(g, dw);
}

template <class R>
executor::Sizes block_sizes(const Shape& s, const Geometry<R>& g) {
  executor::Sizes sizes{};
  sizes.y = g.n * g.pooled();
  Arena<R> saved(nullptr), saved_dot(nullptr);
  Saved<R>(s, g, saved);
  SavedDot<R>(g, saved_dot);
  sizes.saved = saved.used;
  sizes.saved_dot = saved_dot.used;
  const Room<R> rooms[] = {Room<R>::template of<ForwardScratch<R>>(nullptr, 1, s, g),
                           Room<R>::template of<TangentScratch<R>>(nullptr, 1, s, g),
                           Room<R>::template of<GradientScratch<R, 1>>(nullptr, 1, s, g),
                           Room<R>::template of<GradientScratch<R, 2>>(nullptr, 1, s, g)};
  for (const Room<R>& room : rooms) {
    sizes.scratch = maximum(sizes.scratch, room.common);
    sizes.thread_scratch = maximum(sizes.thread_scratch, room.own);
  }
  return sizes;
}

template <class R, class A>
void block_forward(const Shape& s, const Geometry<R>& g, const executor::Primal<R>& p, R* memory) {
  typedef ForwardScratch<R> Scratch;
  const auto room = Room<R>::template of<Scratch>(memory, p.threads, s, g);
  Arena<R> kept(p.saved);
  const Saved<R> saved(s, g, kept);
  Scratch scratch = room.template at<Scratch>(0, s, g);
  scratch.product.prepare(p.w[0], room.threads);
  for_each_seat<Scratch>(s, g, room, [](Scratch own) { own.product.prepare_own(); });
  parallel_for(scratch.product.pieces(), room.threads, [&](std::int64_t first, std::int64_t last, int seat) {
    Scratch own = room.template at<Scratch>(seat, s, g);
    for (std::int64_t i = first; i < last; ++i) {
      const Piece piece = own.product.piece(i);
      own.product.apply(p.x[0], p.w[0], piece, saved.z);
      if (s.norm == Norm::batch)
        own.moments_of(g, i).find(saved.z + piece.first * g.w * g.co, piece.rows * g.w, g.co);
    }
  });
  if (s.norm == Norm::batch) {
    const Moments<R> all{saved.statistics.mean, saved.statistics.inverse};
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < scratch.product.pieces(); ++i) {
      const std::int64_t more = scratch.product.piece(i).rows * g.w;
      all.include(scratch.moments_of(g, i), count, more, g.co);
      count += more;
    }
    finish_statistics(s, g, saved.statistics);
  } else if (s.norm == Norm::running) {
    running_statistics(s, g, p.w, saved.statistics);
  }
  coefficients(s, g, saved.statistics, p.w, scratch.k.affine);
  const Bands<R> bands(s, g);
  for_each_band(bands, 0, bands.count(), room.threads, [&](const Band<R>& b) {
    const Passes<R, A> passes(s, b.g, scratch.k.affine, scratch.k.tangent);
    passes.forward(saved.z + b.z, p.y + b.y, saved.codes_at(b.y));
  });
}

template <class R, class A>
void block_backward(const Shape& s, const Geometry<R>& g, const executor::Primal<R>& p, R* memory) {
  typedef GradientScratch<R, 1> Scratch;
  const auto room = Room<R>::template of<Scratch>(memory, p.threads, s, g);
  Arena<R> kept(p.saved);
  const Saved<R> saved(s, g, kept);
  Scratch scratch = room.template at<Scratch>(0, s, g);
  const Statistics<R>& st = saved.statistics;
  const Coefficients<R>& k = scratch.k;
  const bool batch = s.norm == Norm::batch, normalises = s.norm != Norm::none;
  coefficients(s, g, st, p.w, k.affine);
  const auto cotangents = [&](const Band<R>& b, R* dz) {
    return Cotangents<R>{p.dy + b.y, nullptr, saved.codes_at(b.y), dz, nullptr};
  };

  const Bands<R> bands(s, g);
  scratch.sums.find(g, bands, room.threads, [&](const Band<R>& b, int seat, double* sum, double* product) {
    const Passes<R, A> passes(s, b.g, k.affine, k.tangent);
    passes.sums(cotangents(b, room.template at<Scratch>(seat, s, g).dz), saved.z + b.z, sum, product);
  });
  for (std::int64_t c = 0; c < g.co; ++c) {
    st.db[c] = static_cast<R>(scratch.sums.sum[c]);
    st.dg[c] = normalises ? static_cast<R>(scratch.sums.product[c] * static_cast<double>(st.inverse[c])) : R(0);
    if (p.dw[1] != nullptr) p.dw[1][c] = batch ? R(0) : k.affine.a[c] * st.db[c];
    if (p.dw[2] != nullptr) p.dw[2][c] = st.dg[c];
    if (p.dw[3] != nullptr) p.dw[3][c] = st.db[c];
  }
  if (p.dx[0] == nullptr && p.dw[0] == nullptr) return;

  coefficients_cotangent(s, g, st, k.affine, k.cotangent);
  scratch.product.prepare(p.w, p.dx[0] == nullptr ? 0 : 1, room.threads);
  pass_back<Scratch>(
      s, g, room, p.dx[0], p.dw[0],
      [&](const Scratch& own, const Band<R>& b, std::int64_t at) {
        const Passes<R, A> passes(s, b.g, k.affine, k.tangent);
        passes.backward(cotangents(b, own.dz + at), k.cotangent, saved.z + b.z, own.dz + at);
      },
      [&](const Scratch& own) { return GradientTerms<R, 1>{{{own.dz, 0, p.x[0]}}}; });
}

template <class R, class A>
void block_tangent(const Shape& s, const Geometry<R>& g, const executor::Primal<R>& p, const executor::Tangent<R>& d,
                   R* memory) {
  typedef TangentScratch<R> Scratch;
  const auto room = Room<R>::template of<Scratch>(memory, p.threads, s, g);
  Arena<R> kept(p.saved), kept_dot(d.saved_dot);
  const Saved<R> saved(s, g, kept);
  const SavedDot<R> dot(g, kept_dot);
  Scratch scratch = room.template at<Scratch>(0, s, g);
  const Coefficients<R>& k = scratch.k;

  typename TangentProduct<R>::Term terms[2];
  int count = 0;
  if (d.x_dot[0] != nullptr) terms[count++] = {d.x_dot[0], p.w[0]};
  if (d.w_dot[0] != nullptr) terms[count++] = {p.x[0], d.w_dot[0]};
  if (count == 0) {
    fill_zero(dot.z_dot, g.n * g.result());
  } else {
    scratch.product.prepare(terms, count, room.threads);
    for_each_seat<Scratch>(s, g, room, [](Scratch own) { own.product.prepare_own(); });
    parallel_for(scratch.product.pieces(), room.threads, [&](std::int64_t first, std::int64_t last, int seat) {
      Scratch own = room.template at<Scratch>(seat, s, g);
      for (std::int64_t i = first; i < last; ++i) own.product.apply(terms, count, i, dot.z_dot);
    });
  }

  coefficients(s, g, saved.statistics, p.w, k.affine);
  const Bands<R> bands(s, g);
  if (s.norm == Norm::batch) {
    scratch.sums.find(g, bands, room.threads, [&](const Band<R>& b, int, double* sum, double* product) {
      const Passes<R, A> passes(s, b.g, k.affine, k.tangent);
      passes.sums_dot(saved.z + b.z, dot.z_dot + b.z, sum, product);
    });
    const double share = 1 / static_cast<double>(g.count());
    for (std::int64_t c = 0; c < g.co; ++c) {
      dot.statistics.mean[c] = static_cast<R>(scratch.sums.sum[c] * share);
      dot.statistics.spread[c] = static_cast<R>(scratch.sums.product[c] * share) * saved.statistics.inverse[c];
    }
  } else if (s.norm == Norm::running) {
    for (std::int64_t c = 0; c < g.co; ++c) {
      dot.statistics.mean[c] = s.bias ? -entry(d.w_dot[1], c, R(0)) : R(0);
      dot.statistics.spread[c] = 0;
    }
  }
  coefficients_tangent(s, g, saved.statistics, dot.statistics, k.affine, d.w_dot, k.tangent);
  for_each_band(bands, 0, bands.count(), room.threads, [&](const Band<R>& b) {
    const Passes<R, A> passes(s, b.g, k.affine, k.tangent);
    passes.tangent(saved.z + b.z, dot.z_dot + b.z, saved.codes_at(b.y), d.y_dot + b.y);
  });
}

template <class R, class A>
void block_tangent_backward(const Shape& s, const Geometry<R>& g, const executor::Primal<R>& p,
                            const executor::Tangent<R>& d, R* memory) {
  typedef GradientScratch<R, 2> Scratch;
  const auto room = Room<R>::template of<Scratch>(memory, p.threads, s, g);
  Arena<R> kept(p.saved), kept_dot(d.saved_dot);
  const Saved<R> saved(s, g, kept);
  const SavedDot<R> dot(g, kept_dot);
  Scratch scratch = room.template at<Scratch>(0, s, g);
  const Statistics<R>& st = saved.statistics;
  const Coefficients<R>& k = scratch.k;
  const bool batch = s.norm == Norm::batch, normalises = s.norm != Norm::none;
  coefficients(s, g, st, p.w, k.affine);
  coefficients_tangent(s, g, st, dot.statistics, k.affine, d.w_dot, k.tangent);
  const auto cotangents = [&](const Band<R>& b, R* dz, R* dz_dot) {
    return Cotangents<R>{p.dy + b.y, d.dy_dot + b.y, saved.codes_at(b.y), dz, dz_dot};
  };

  const Bands<R> bands(s, g);
  scratch.sums.find(g, bands, room.threads, [&](const Band<R>& b, int seat, double* sum, double* product) {
    const Passes<R, A> passes(s, b.g, k.affine, k.tangent);
    const Scratch own = room.template at<Scratch>(seat, s, g);
    passes.sums_tangent_backward(cotangents(b, own.dz, own.dz_dot), saved.z + b.z, dot.z_dot + b.z, sum, product);
  });
  for (std::int64_t c = 0; c < g.co; ++c) {
    const R product = static_cast<R>(scratch.sums.product[c]);
    k.db_dot[c] = static_cast<R>(scratch.sums.sum[c]);
    k.dg_dot[c] = normalises ? st.inverse[c] * (product - dot.statistics.spread[c] * st.dg[c]) : R(0);
    if (d.dw_dot[1] != nullptr) d.dw_dot[1][c] = batch ? R(0) : k.affine.a[c] * k.db_dot[c] + k.tangent.e[c] * st.db[c];
    if (d.dw_dot[2] != nullptr) d.dw_dot[2][c] = k.dg_dot[c];
    if (d.dw_dot[3] != nullptr) d.dw_dot[3][c] = k.db_dot[c];
  }
  R *dx_dot = d.dx_dot[0], *dw_dot = d.dw_dot[0];
  if (dx_dot == nullptr && dw_dot == nullptr) return;

  coefficients_cotangent(s, g, st, k.affine, k.cotangent);
  coefficients_cotangent_dot(s, g, st, dot.statistics, k.affine, k.tangent, k.db_dot, k.dg_dot,
                             k.cotangent_dot);
  const bool weight_varies = d.w_dot[0] != nullptr;
  const R* const weights[] = {p.w[0], d.w_dot[0]};
  scratch.product.prepare(weights, dx_dot == nullptr ? 0 : weight_varies ? 2 : 1, room.threads);
  pass_back<Scratch>(
      s, g, room, dx_dot, dw_dot,
      [&](const Scratch& own, const Band<R>& b, std::int64_t at) {
        const Passes<R, A> passes(s, b.g, k.affine, k.tangent);
        R *dz = own.dz + at, *dz_dot = own.dz_dot + at;
        passes.tangent_backward(cotangents(b, dz, dz_dot), k.cotangent, k.cotangent_dot, saved.z + b.z, dot.z_dot + b.z,
                                dz, dz_dot);
      },
      [&](const Scratch& own) {
        return GradientTerms<R, 2>{{{own.dz_dot, 0, p.x[0]}, {own.dz, weight_varies ? 1 : -1, d.x_dot[0]}}};
      });
}

}  // namespace
}  // namespace fastmeta::conv_block
