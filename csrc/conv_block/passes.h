// The loops over a band of an image between the convolution's result z and the block's result y, forward and back, once
// each.
//
// A few vectors of channels go side by side, pixel after pixel: memory is read in order, coefficients stay in
// registers.
#pragma once

#include "activation.h"
#include "normalise.h"

namespace fastmeta::conv_block {
namespace {

// A cotangent of y, and its tangent where there is one, on their way back through the pool.
template <class R>
struct Cotangents {
  const R *dy, *dy_dot;       // one image
  const std::uint8_t* codes;  // null where the pool is no maximum
  R *memory, *memory_dot;     // image-sized, for windows that overlap
};

template <class T>
struct Referred;
template <class T>
struct Referred<const T&> {
  typedef T type;
};

// A stretch of rows of one image and of what is pooled from them, as an image of its own.
template <class R>
struct Band {
  Geometry<R> g;
  std::int64_t image, z, y;  // where it starts, in z and in y
};

constexpr std::int64_t band_bytes = 64 * 1024;  // of z

// All images cut into bands, which threads share out. Windows that overlap keep an image in one band.
template <class R>
struct Bands {
  const Geometry<R>& g;
  std::int64_t each, step;  // bands of an image; rows of z to one of y

  Bands(const Shape& s, const Geometry<R>& geometry) : g(geometry), each(1), step(s.pool.kind == Pool::none ? 1 : 2) {
    if (s.pool.kind != Pool::none && !is_2x2(s.pool)) return;
    each = maximum(1, minimum(g.ph, g.result() * static_cast<std::int64_t>(sizeof(R)) / band_bytes));
  }

  std::int64_t count() const { return g.n * each; }
  std::int64_t parts() const { return minimum(count(), most_parts); }
  Band<R> operator[](std::int64_t i) const {
    const std::int64_t image = i / each, first = g.ph * (i % each) / each, last = g.ph * (i % each + 1) / each;
    Band<R> band{g, image, image * g.result(), image * g.pooled()};
    if (each == 1) return band;
    band.z += first * step * g.w * g.co;
    band.y += first * g.pw * g.co;
    band.g.ph = last - first;
    band.g.h = (last == g.ph ? g.h : last * step) - first * step;
    return band;
  }
};

template <class R, class A>
struct Passes {
  typedef Vector<R> V;
  static constexpr int limit = A::bends ? 1 : side_by_side<R>;  // long activations gain nothing from more
  const Shape& s;
  const Geometry<R>& g;  // of a band
  A act;
  Affine<R> k;
  AffineTangent<R> t;

  Passes(const Shape& shape, const Geometry<R>& geometry, const Affine<R>& affine, const AffineTangent<R>& tangent)
      : s(shape), g(geometry), act(shape), k(affine), t(tangent) {}

  // One channel vector, with its coefficients.
  struct Point {
    V mean, a, b;
    FASTMETA_INLINE V u(V z) const { return (z - mean) * a + b; }
  };
  struct PointDot {
    V mean_dot, e, f;
    FASTMETA_INLINE V u_dot(const Point& p, V z, V z_dot) const {
      return (z_dot - mean_dot) * p.a + ((z - p.mean) * e + f);
    }
  };
  template <class T, int many>
  struct Several {
    T of[many];
    FASTMETA_INLINE const T& operator[](int j) const { return of[j]; }
  };
  // Those of `many` vectors from c.
  template <int many>
  FASTMETA_INLINE Several<V, many> entries(const R* p, std::int64_t c) const {
    Several<V, many> v;
#pragma GCC unroll 4
    for (int j = 0; j < many; ++j) v.of[j] = load(p + c + j * width<R>);
    return v;
  }
  template <int many>
  FASTMETA_INLINE Several<Point, many> points(std::int64_t c) const {
    Several<Point, many> p;
#pragma GCC unroll 4
    for (int j = 0; j < many; ++j, c += width<R>) p.of[j] = {load(k.mean + c), load(k.a + c), load(k.b + c)};
    return p;
  }
  template <int many>
  FASTMETA_INLINE Several<PointDot, many> point_dots(std::int64_t c) const {
    Several<PointDot, many> p;
#pragma GCC unroll 4
    for (int j = 0; j < many; ++j, c += width<R>) p.of[j] = {load(t.mean_dot + c), load(t.e + c), load(t.f + c)};
    return p;
  }

  // visit(j, offset of the pixel and vector) for every pixel and the j-th of `many` vectors from `c`; end after each
  // row.
  template <int many, class Visit, class End>
  FASTMETA_INLINE void for_each(std::int64_t c, Visit visit, End end) const {
    std::int64_t at = c;
    for (std::int64_t y = 0; y < g.h; ++y) {
      for (std::int64_t x = 0; x < g.w; ++x, at += g.co)
#pragma GCC unroll 4
        for (int j = 0; j < many; ++j) visit(j, at + j * width<R>);
      end();
    }
  }
  template <int many, class Visit>
  FASTMETA_INLINE void for_each(std::int64_t c, Visit visit) const {
    for_each<many>(c, visit, [] {});
  }

  void forward(const R* z, R* y, std::uint8_t* codes) const {
    for_window(s.pool, [&](const auto& win) {
      typedef typename Referred<decltype(win)>::type W;
      in_blocks<R, W::disjoint ? limit : 1>(g.co, [&](auto many, std::int64_t c) {
        constexpr int m = decltype(many)::value;
        const auto p = points<m>(c);
        [[maybe_unused]] const auto value = [&](int j, std::int64_t at) {
          return act.value(p[j].u(load(z + c + at + j * width<R>)));
        };
        if constexpr (!W::pools) {
          for_each<m>(c, [&](int j, std::int64_t at) { store(y + at, act.value(p[j].u(load(z + at)))); });
        } else if (s.pool.kind == Pool::max) {
          pool_maximum<m>(win, g, y + c, codes + c, value);
        } else {
          pool_average<m>(win, g, y + c, value);
        }
      });
    });
    clear_padding(s.activation, y, g.ph * g.pw, g.out, g.co);
  }

  void tangent(const R* z, const R* z_dot, const std::uint8_t* codes, R* y_dot) const {
    for_window(s.pool, [&](const auto& win) {
      typedef typename Referred<decltype(win)>::type W;
      in_blocks<R, W::disjoint ? limit : 1>(g.co, [&](auto many, std::int64_t c) {
        constexpr int m = decltype(many)::value;
        const auto p = points<m>(c);
        const auto d = point_dots<m>(c);
        const auto slope_times = [&](int j, V x, V x_dot) { return act.slope(p[j].u(x)) * d[j].u_dot(p[j], x, x_dot); };
        [[maybe_unused]] const auto value = [&](int j, std::int64_t at) {
          at += c + j * width<R>;
          return slope_times(j, load(z + at), load(z_dot + at));
        };
        if constexpr (!W::pools) {
          for_each<m>(c, [&](int j, std::int64_t at) {
            store(y_dot + at, slope_times(j, load(z + at), load(z_dot + at)));
          });
        } else if (s.pool.kind == Pool::max) {
          pool_remembered<m>(win, g, codes + c, y_dot + c, value);
        } else {
          pool_average<m>(win, g, y_dot + c, value);
        }
      });
    });
  }

  // Sums of z_dot, and of z_dot times (z - mean).
  void sums_dot(const R* z, const R* z_dot, double* sum, double* product) const {
    in_blocks<R>(g.co, [&](auto many, std::int64_t c) {
      constexpr int m = decltype(many)::value;
      Sums<m> sums(sum + c, product + c);
      const auto mean = entries<m>(k.mean, c);
      for_each<m>(c, [&](int j, std::int64_t at) {
        const V d = load(z_dot + at);
        sums.add(j, d, d * (load(z + at) - mean[j]));
      }, [&] { sums.flush(); });
    });
  }

  // Sums of dv = f' du, and of dv times (z - mean).
  void sums(const Cotangents<R>& from, const R* z, double* sum, double* product) const {
    for_each_cotangent<false>(from, [&](auto many, std::int64_t c, auto visit_all) {
      constexpr int m = decltype(many)::value;
      Sums<m> sums(sum + c, product + c);
      const auto p = points<m>(c);
      visit_all([&](int j, std::int64_t at, V du, V) {
        const V x = load(z + at), dv = act.slope(p[j].u(x)) * du;
        sums.add(j, dv, dv * (x - p[j].mean));
      }, [&] { sums.flush(); });
    });
  }

  void backward(const Cotangents<R>& from, const Cotangent<R>& d, const R* z, R* dz) const {
    for_each_cotangent<true>(from, [&](auto many, std::int64_t c, auto visit_all) {
      constexpr int m = decltype(many)::value;
      const auto p = points<m>(c);
      const auto k0 = entries<m>(d.k0, c), k1 = entries<m>(d.k1, c);
      visit_all([&](int j, std::int64_t at, V du, V) {
        const V x = load(z + at), dv = act.slope(p[j].u(x)) * du;
        store(dz + at, dv * p[j].a + (k0[j] + (x - p[j].mean) * k1[j]));
      }, [] {});
    });
  }

  FASTMETA_INLINE V dv_dot(const Point& p, const PointDot& q, V z, V z_dot, V du, V du_dot) const {
    const V u = p.u(z);
    V r = act.slope(u) * du_dot;
    if constexpr (A::bends) r += act.bend(u) * q.u_dot(p, z, z_dot) * du;
    return r;
  }

  // Sums of dv_dot, and of dv_dot times (z - mean) with dv times (z_dot - mean_dot).
  void sums_tangent_backward(const Cotangents<R>& from, const R* z, const R* z_dot, double* sum,
                             double* product) const {
    for_each_cotangent<false>(from, [&](auto many, std::int64_t c, auto visit_all) {
      constexpr int m = decltype(many)::value;
      Sums<m> sums(sum + c, product + c);
      const auto p = points<m>(c);
      const auto q = point_dots<m>(c);
      visit_all([&](int j, std::int64_t at, V du, V du_dot) {
        const V x = load(z + at), x_dot = load(z_dot + at);
        const V v_dot = dv_dot(p[j], q[j], x, x_dot, du, du_dot);
        sums.add(j, v_dot, v_dot * (x - p[j].mean) + act.slope(p[j].u(x)) * du * (x_dot - q[j].mean_dot));
      }, [&] { sums.flush(); });
    });
  }

  void tangent_backward(const Cotangents<R>& from, const Cotangent<R>& d, const CotangentDot<R>& dd, const R* z,
                        const R* z_dot, R* dz, R* dz_dot) const {
    for_each_cotangent<true>(from, [&](auto many, std::int64_t c, auto visit_all) {
      constexpr int m = decltype(many)::value;
      const auto p = points<m>(c);
      const auto q = point_dots<m>(c);
      visit_all([&](int j, std::int64_t at, V du, V du_dot) {
        const std::int64_t cj = c + j * width<R>;
        const V x = load(z + at), x_dot = load(z_dot + at);
        const V dv = act.slope(p[j].u(x)) * du, centred = x - p[j].mean;
        store(dz + at, dv * p[j].a + (load(d.k0 + cj) + centred * load(d.k1 + cj)));
        store(dz_dot + at, dv_dot(p[j], q[j], x, x_dot, du, du_dot) * p[j].a + dv * load(dd.a_dot + cj) +
                               (load(dd.k0 + cj) + centred * load(dd.k1 + cj) +
                                (x_dot - q[j].mean_dot) * load(dd.k2 + cj)));
      }, [] {});
    });
  }

 private:
  // Two sums a vector: of a row in registers, of all rows in double precision in memory.
  template <int many>
  struct Sums {
    double *sum, *product;
    V total[many] = {}, spread[many] = {};
    Sums(double* s_, double* p_) : sum(s_), product(p_) {}
    FASTMETA_INLINE void add(int j, V a, V b) {
      total[j] += a;
      spread[j] += b;
    }
    FASTMETA_INLINE void flush() {
#pragma GCC unroll 4
      for (int j = 0; j < many; ++j) {
        accumulate<R>(sum + j * width<R>, total[j]);
        accumulate<R>(product + j * width<R>, spread[j]);
        total[j] = spread[j] = V{};
      }
    }
  };

  // body(count of vectors, first channel, visit_all), where visit_all takes visit(j, offset, du, du_dot) and end,
  // called after each row. Pixels under no window, where du is zero, are visited if `all`.
  template <bool all, class Body>
  FASTMETA_INLINE void for_each_cotangent(const Cotangents<R>& from, Body body) const {
    const bool windows = s.pool.kind != Pool::none && is_2x2(s.pool), dots = from.dy_dot != nullptr;
    const R *du = from.dy, *du_dot = from.dy_dot;
    if (s.pool.kind != Pool::none && !windows) {
      unpool(Window{s.pool}, g, from.dy, from.codes, from.memory);
      if (dots) unpool(Window{s.pool}, g, from.dy_dot, from.codes, from.memory_dot);
      du = from.memory;
      du_dot = from.memory_dot;
    }
    in_blocks<R, limit>(g.co, [&](auto many, std::int64_t c) {
      constexpr int m = decltype(many)::value;
      if (windows) {
        body(many, c, [&](auto visit, auto end) {
          unpool_2x2<m, all>(
              g, from.dy + c, dots ? from.dy_dot + c : nullptr, from.codes == nullptr ? nullptr : from.codes + c,
              [&](int j, std::int64_t at, V d, V d_dot) { visit(j, c + at + j * width<R>, d, d_dot); }, end);
        });
      } else {
        body(many, c, [&](auto visit, auto end) {
          for_each<m>(
              c, [&](int j, std::int64_t at) { visit(j, at, load(du + at), dots ? load(du_dot + at) : V{}); }, end);
        });
      }
    });
  }
};

}  // namespace
}  // namespace fastmeta::conv_block
