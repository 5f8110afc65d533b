#include "../common/curves.h"
#include "rows.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// With x = (z - mean) r the normalised input, r = 1 / s, a = weight r, t = mean(x z_dot), d = weight du the cotangent
// of x and m = mean(d), n = mean(d x), all maps are affine in what they read:
//   u      = (z - mean) a + bias
//   u_dot  = (z_dot - mean_dot) a + (z - mean) e + bias_dot                 e = r (weight_dot - a t)
//   dz     = du a - r m - (z - mean) r r n
//   dz_dot = du_dot a + du e + r (t r m - m_dot) + (z - mean) r r (2 t r n - n_dot) - (z_dot - mean_dot) r r n
// Running statistics are constants: t, m, n and their tangents are zero.
// u, and with it the activation's slope, is computed again wherever it is wanted: reading it would take as long.

namespace fastmeta::norm::FASTMETA_ISA {
namespace {

// Coefficients of a vector of channels.
template <class R>
struct Point {
  typedef Vector<R> V;
  V mean, inverse, a, b;

  Point(const Scratch<R>& k, const Shape& s, const Primal<R>& p, std::int64_t c)
      : mean(load(k.mean + c)),
        inverse(load(k.inverse + c)),
        a(inverse * load((s.weight ? p.w[0] : k.ones) + c)),
        b(load((s.bias ? p.w[1] : k.zeros) + c)) {}

  FASTMETA_INLINE V u(V z) const { return (z - mean) * a + b; }
};

template <class R>
struct PointDot {
  typedef Vector<R> V;
  V mean, e, f;

  PointDot(const Scratch<R>& k, const Point<R>& point, const Tangent<R>& t, std::int64_t c)
      : mean(load(k.mean_dot + c)),
        e(point.inverse *
          (load((t.w_dot[0] != nullptr ? t.w_dot[0] : k.zeros) + c) - point.a * load(k.spread_dot + c))),
        f(load((t.w_dot[1] != nullptr ? t.w_dot[1] : k.zeros) + c)) {}

  FASTMETA_INLINE V u(const Point<R>& point, V z, V z_dot) const {
    return (z_dot - mean) * point.a + ((z - point.mean) * e + f);
  }
};

template <class R>
FASTMETA_INLINE Vector<R> load_or_zero(const R* p, std::int64_t i) {
  return p == nullptr ? Vector<R>{} : load(p + i);
}

// Calls visit(at) for every pixel of a sample, where prepare(c) makes `visit` for a vector of channels.
template <class R, class Prepare>
FASTMETA_INLINE void for_pixels(const Layout<R>& l, Prepare prepare) {
  for (std::int64_t c = 0; c < l.co; c += width<R>) {
    const auto visit = prepare(c);
    for (std::int64_t p = 0; p < l.s.pixels; ++p) visit(p * l.co + c);
  }
}

template <class R>
Sizes sizes(const void* shape) {
  const Layout<R> l(shape);
  Sizes sizes{};
  sizes.y = l.s.samples * l.size;
  sizes.rereads_y = l.s.activation != Activation::identity;
  sizes.saved = Saved<R>::elements(l);
  sizes.saved_dot = SavedDot<R>::elements(l);
  sizes.scratch = Scratch<R>::elements(l);
  sizes.weights[0] = l.s.weight ? l.co : 0;
  sizes.weights[1] = l.s.bias ? l.co : 0;
  sizes.weights[2] = sizes.weights[3] = l.s.running ? l.co : 0;
  return sizes;
}

template <class R>
void pack(const void* shape, int, const R* tensor, R* packed) {
  const Layout<R> l(shape);
  for (std::int64_t c = 0; c < l.co; ++c) packed[c] = c < l.s.channels ? tensor[c] : R(0);
}

template <class R>
void unpack(const void* shape, int, const R* packed, R* tensor) {
  const Layout<R> l(shape);
  for (std::int64_t c = 0; c < l.s.channels; ++c) tensor[c] = packed[c];
}

template <class R>
void find_statistics(const Layout<R>& l, const R* z, const Scratch<R>& k, const Saved<R>& saved) {
  k.template sum_pixels<1>([&](std::int64_t) {
    return [&](std::int64_t at) { return Terms<R, 1>{{load(z + at)}}; };
  });
  k.by_group(saved.mean(), k.mean, [&](auto at) { return at(k.sums[0]); },
             [&](double total, std::int64_t) { return total * l.share; });
  k.template sum_pixels<1>([&](std::int64_t c) {
    return [&, mean = load(k.mean + c)](std::int64_t at) {
      const Vector<R> centred = load(z + at) - mean;
      return Terms<R, 1>{{centred * centred}};
    };
  });
  k.by_group(saved.inverse(), k.inverse, [&](auto at) { return at(k.sums[0]); },
             [&](double total, std::int64_t) { return 1 / square_root(total * l.share + l.s.eps); });
}

template <class R>
void take_statistics(const Layout<R>& l, const R* mean, const R* variance, const Scratch<R>& k, const Saved<R>& saved) {
  for (std::int64_t c = 0; c < l.s.channels; ++c) {
    saved.mean()[c] = k.mean[c] = mean[c];
    saved.inverse()[c] = k.inverse[c] =
        static_cast<R>(1 / square_root(static_cast<double>(variance[c]) + l.s.eps));
  }
}

template <class R, class C>
void forward(const Layout<R>& l, const Primal<R>& p, R* scratch, C curve) {
  const Scratch<R> k(l, scratch);
  const R slope = static_cast<R>(l.s.slope);
  for (std::int64_t i = 0; i < l.samples; ++i) {
    const R* z = p.x[0] + i * l.size;
    R* y = p.y + i * l.size;
    const Saved<R> saved(l, p.saved, i);
    if (l.s.running) {
      take_statistics(l, p.w[2], p.w[3], k, saved);
    } else {
      find_statistics(l, z, k, saved);
    }
    for_pixels(l, [&](std::int64_t c) {
      return [&, point = Point<R>(k, l.s, p, c)](std::int64_t at) {
        store(y + at, curve.value(point.u(load(z + at)), slope));
      };
    });
    clear_padding(l.s.activation, y, l.s.pixels, l.s.channels, l.co);
  }
}

template <class R, class C>
void backward(const Layout<R>& l, const Primal<R>& p, R* scratch, C curve) {
  const Scratch<R> k(l, scratch);
  const R* weight = l.s.weight ? p.w[0] : k.ones;
  const R slope = static_cast<R>(l.s.slope);
  for (std::int64_t i = 0; i < l.samples; ++i) {
    const R *z = p.x[0] + i * l.size, *y = p.y + i * l.size, *dy = p.dy + i * l.size;
    const Saved<R> saved(l, p.saved, i);
    k.spread(saved.mean(), k.mean);
    k.spread(saved.inverse(), k.inverse);
    const auto du_at = [&](const Point<R>& point, std::int64_t at) {
      return curve.slope(load(y + at), point.u(load(z + at)), slope) * load(dy + at);
    };
    k.template sum_pixels<2>([&](std::int64_t c) {
      return [&, point = Point<R>(k, l.s, p, c)](std::int64_t at) {
        const Vector<R> du = du_at(point, at);
        return Terms<R, 2>{{du, du * (load(z + at) - point.mean)}};
      };
    });
    const double *sum = k.sums[0], *product = k.sums[1];
    k.by_group(saved.d_mean(), k.d_mean, [=](auto at) { return at(weight) * at(sum); },
               [&](double total, std::int64_t) { return total * l.share; });
    k.by_group(saved.d_spread(), k.d_spread, [=](auto at) { return at(weight) * at(product); },
               [&](double total, std::int64_t g) { return total * l.share * static_cast<double>(saved.inverse()[g]); });
    for (std::int64_t c = 0; c < l.co; ++c) {
      k.totals[0][c] += product[c] * static_cast<double>(k.inverse[c]);
      k.totals[1][c] += sum[c];
    }
    if (p.dx[0] == nullptr) continue;
    R* dz = p.dx[0] + i * l.size;
    for_pixels(l, [&](std::int64_t c) {
      const Point<R> point(k, l.s, p, c);
      const Vector<R> k0 = point.inverse * load(k.d_mean + c);
      const Vector<R> k1 = point.inverse * point.inverse * load(k.d_spread + c);
      return [&, point, k0, k1](std::int64_t at) {
        store(dz + at, du_at(point, at) * point.a - (k0 + (load(z + at) - point.mean) * k1));
      };
    });
  }
  k.store_totals(p.dw);
}

template <class R, class C>
void tangent(const Layout<R>& l, const Primal<R>& p, const Tangent<R>& t, R* scratch, C curve) {
  const Scratch<R> k(l, scratch);
  const R slope = static_cast<R>(l.s.slope);
  for (std::int64_t i = 0; i < l.samples; ++i) {
    const R *z = p.x[0] + i * l.size, *y = p.y + i * l.size;
    const R* z_dot = t.x_dot[0] == nullptr ? nullptr : t.x_dot[0] + i * l.size;
    R* y_dot = t.y_dot + i * l.size;
    const Saved<R> saved(l, p.saved, i);
    const SavedDot<R> dot(l, t.saved_dot, i);
    k.spread(saved.mean(), k.mean);
    k.spread(saved.inverse(), k.inverse);
    if (!l.s.running)
      k.template sum_pixels<2>([&](std::int64_t c) {
        return [&, mean = load(k.mean + c)](std::int64_t at) {
          const Vector<R> d = load_or_zero(z_dot, at);
          return Terms<R, 2>{{d, d * (load(z + at) - mean)}};
        };
      });
    k.by_group(dot.mean(), k.mean_dot, [&](auto at) { return at(k.sums[0]); },
               [&](double total, std::int64_t) { return total * l.share; });
    k.by_group(dot.spread(), k.spread_dot, [&](auto at) { return at(k.sums[1]); },
               [&](double total, std::int64_t g) { return total * l.share * static_cast<double>(saved.inverse()[g]); });
    for_pixels(l, [&](std::int64_t c) {
      const Point<R> point(k, l.s, p, c);
      const PointDot<R> turn(k, point, t, c);
      return [&, point, turn](std::int64_t at) {
        const Vector<R> x = load(z + at);
        store(y_dot + at, curve.slope(load(y + at), point.u(x), slope) * turn.u(point, x, load_or_zero(z_dot, at)));
      };
    });
  }
}

template <class R, class C>
void tangent_backward(const Layout<R>& l, const Primal<R>& p, const Tangent<R>& t, R* scratch, C curve) {
  typedef Vector<R> V;
  const Scratch<R> k(l, scratch);
  const R* weight = l.s.weight ? p.w[0] : k.ones;
  const R* weight_dot = t.w_dot[0] != nullptr ? t.w_dot[0] : k.zeros;
  const R slope = static_cast<R>(l.s.slope);
  for (std::int64_t i = 0; i < l.samples; ++i) {
    const R *z = p.x[0] + i * l.size, *y = p.y + i * l.size, *dy = p.dy + i * l.size, *dy_dot = t.dy_dot + i * l.size;
    const R* z_dot = t.x_dot[0] == nullptr ? nullptr : t.x_dot[0] + i * l.size;
    const Saved<R> saved(l, p.saved, i);
    const SavedDot<R> dot(l, t.saved_dot, i);
    k.spread(saved.mean(), k.mean);
    k.spread(saved.inverse(), k.inverse);
    k.spread(saved.d_mean(), k.d_mean);
    k.spread(saved.d_spread(), k.d_spread);
    k.spread(dot.mean(), k.mean_dot);
    k.spread(dot.spread(), k.spread_dot);
    const auto du_at = [&](const Point<R>& point, const PointDot<R>& turn, std::int64_t at) {
      const V x = load(z + at), u = point.u(x), f = load(y + at), s = curve.slope(f, u, slope), d = load(dy + at);
      Both<R> du{s * d, s * load(dy_dot + at)};
      if constexpr (C::bends) du.dot += curve.bend(f, u) * turn.u(point, x, load_or_zero(z_dot, at)) * d;
      return du;
    };
    k.template sum_pixels<4>([&](std::int64_t c) {
      const Point<R> point(k, l.s, p, c);
      const PointDot<R> turn(k, point, t, c);
      return [&, point, turn](std::int64_t at) {
        const auto [du, du_dot] = du_at(point, turn, at);
        const V centred = load(z + at) - point.mean;
        return Terms<R, 4>{
            {du, du * centred, du_dot, du_dot * centred + du * (load_or_zero(z_dot, at) - turn.mean)}};
      };
    });
    const double *sum = k.sums[0], *product = k.sums[1], *sum_dot = k.sums[2], *product_dot = k.sums[3];
    const auto with_weights = [=](const double* by_weight_dot, const double* by_weight) {
      return [=](auto at) { return at(weight_dot) * at(by_weight_dot) + at(weight) * at(by_weight); };
    };
    k.by_group(nullptr, k.d_mean_dot, with_weights(sum, sum_dot),
               [&](double total, std::int64_t) { return total * l.share; });
    k.by_group(nullptr, k.d_spread_dot, with_weights(product, product_dot), [&](double total, std::int64_t g) {
      const double r = static_cast<double>(saved.inverse()[g]), turned = static_cast<double>(dot.spread()[g]);
      return r * (total * l.share - turned * static_cast<double>(saved.d_spread()[g]));
    });
    for (std::int64_t c = 0; c < l.co; ++c) {
      const double r = static_cast<double>(k.inverse[c]), turned = static_cast<double>(k.spread_dot[c]);
      k.totals[0][c] += r * (product_dot[c] - r * turned * product[c]);
      k.totals[1][c] += sum_dot[c];
    }
    if (t.dx_dot[0] == nullptr) continue;
    R* dz_dot = t.dx_dot[0] + i * l.size;
    for_pixels(l, [&](std::int64_t c) {
      const Point<R> point(k, l.s, p, c);
      const PointDot<R> turn(k, point, t, c);
      const V r = point.inverse, tr = load(k.spread_dot + c) * r, n = load(k.d_spread + c);
      const V k0 = r * (tr * load(k.d_mean + c) - load(k.d_mean_dot + c));
      const V k1 = r * r * (2 * tr * n - load(k.d_spread_dot + c)), k2 = r * r * n;
      return [&, point, turn, k0, k1, k2](std::int64_t at) {
        const auto [du, du_dot] = du_at(point, turn, at);
        store(dz_dot + at, du_dot * point.a + du * turn.e + (k0 + (load(z + at) - point.mean) * k1) -
                               (load_or_zero(z_dot, at) - turn.mean) * k2);
      };
    });
  }
  k.store_totals(t.dw_dot);
}

template <class R>
struct Norm {
  static void forward(const void* shape, const Primal<R>& p, R* scratch) {
    const Layout<R> l(shape, p.target);
    for_curve<R>(l.s.activation, [&](auto curve) {
      if (has_rows(l)) return forward_rows(l, p, scratch, curve);
      FASTMETA_ISA::forward(l, p, scratch, curve);
    });
  }
  static void backward(const void* shape, const Primal<R>& p, R* scratch) {
    const Layout<R> l(shape, p.target);
    for_curve<R>(l.s.activation, [&](auto curve) {
      if (has_rows(l)) return backward_rows(l, p, scratch, curve);
      FASTMETA_ISA::backward(l, p, scratch, curve);
    });
  }
  static void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
    const Layout<R> l(shape, p.target);
    for_curve<R>(l.s.activation, [&](auto curve) {
      if (has_rows(l)) return tangent_rows(l, p, t, scratch, curve);
      FASTMETA_ISA::tangent(l, p, t, scratch, curve);
    });
  }
  static void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
    const Layout<R> l(shape, p.target);
    for_curve<R>(l.s.activation, [&](auto curve) {
      if (has_rows(l)) return tangent_backward_rows(l, p, t, scratch, curve);
      FASTMETA_ISA::tangent_backward(l, p, t, scratch, curve);
    });
  }

  static constexpr executor::Maps<R> maps{width<R>, sizes<R>, pack<R>, unpack<R>, forward, backward, tangent,
                                          tangent_backward};
};

}  // namespace

extern const Table table{Norm<float>::maps, Norm<double>::maps};

}  // namespace fastmeta::norm::FASTMETA_ISA
