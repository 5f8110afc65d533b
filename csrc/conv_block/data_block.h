// The four maps of a block on a task's data, batch norm, a piecewise linear activation and 2x2 maxima: the first layer.
//
// It is the largest layer and the cheapest to compute, so the convolution's result z is made a few rows at a time and
// never stored. What z would be needed for follows from mean and covariance of the patches (patches.h): with Q = cov(P)
// w / s,
//   mean z_dot = w_dot^T mean P                mean(x z_dot) = w_dot^T Q
//   d_w = a T, T = S - db mean P - dg Q        S = sum of dv P over the maxima
//   d_w_dot = a_dot T + a (S_dot - db_dot mean P - dg_dot Q - dg Q_dot)
// where x is normalised z. Only x at the maxima is kept.
#pragma once

#include "convolve.h"
#include "maxima.h"
#include "passes.h"
#include "patches.h"

namespace fastmeta::conv_block {
namespace {

constexpr std::int64_t max_patch = 32;  // covariances grow with its square

template <class R>
bool is_data_block(const Shape& s, const Geometry<R>& g) {
  return s.data && s.groups == 1 && s.norm == Norm::batch && is_piecewise(s.activation) &&
         (s.activation != Activation::leaky_relu || s.slope >= 0) && s.pool.kind == Pool::max && is_2x2(s.pool) &&
         s.stride[0] == 1 && s.stride[1] == 1 && g.panels() <= max_patch &&
         canvas_of_input(s, g).plane() >= width<R>;
}

constexpr int below_zero = 4;  // beside the position in the window: the activation's slope is that below zero

template <class R>
struct DataSaved {
  Statistics<R> statistics;
  double *patch_mean, *covariance;
  R *q, *s, *x;  // x at the maxima
  std::uint8_t* codes;

  DataSaved(const Geometry<R>& g, Arena<R>& arena) : statistics(g, arena) {
    patch_mean = arena.template take_as<double>(g.panels());
    covariance = arena.template take_as<double>(g.panels() * g.panels());
    q = arena.take(g.weight());
    s = arena.take(g.weight());
    x = arena.take(g.n * g.pooled());
    codes = arena.template take_as<std::uint8_t>(g.n * g.pooled());
  }
};

template <class R>
struct DataSavedDot {
  StatisticsDot<R> statistics;
  R* x_dot;
  DataSavedDot(const Geometry<R>& g, Arena<R>& arena) : statistics(g, arena), x_dot(arena.take(g.n * g.pooled())) {}
};

constexpr std::int64_t part_pixels = 1960;  // of a part of all rows, about

template <class R>
std::int64_t data_parts(const Geometry<R>& g) {
  return maximum(1, minimum(minimum(most_parts, g.n * g.ph), g.count() / part_pixels));
}

template <class R>
struct DataScratch {
  const Canvas canvas;
  std::int64_t* offset;
  Patches<R> patches;
  Affine<R> k;
  double* wide;          // [rows of the weight, co]
  double *sum, *spread;  // [parts, co]
  R *db, *dg, *s;        // tangents of db, dg and S; of S [parts, rows of the weight, co]
  R *painted, *rows;     // a thread's own: an image, two rows of z
  DataScratch(const Shape& shape, const Geometry<R>& g, Arena<R>& common, Arena<R>& own)
      : canvas(canvas_of_input(shape, g)), offset(common.template take_as<std::int64_t>(g.panels())),
        patches(canvas, g, data_parts(g), common, own) {
    const std::int64_t parts = data_parts(g);
    k = {common.take(g.co), common.take(g.co), common.take(g.co)};
    wide = common.template take_as<double>(g.weight());
    sum = common.template take_as<double>(parts * g.co);
    spread = common.template take_as<double>(parts * g.co);
    db = common.take(g.co);
    dg = common.take(g.co);
    s = common.take(parts * g.weight());
    painted = own.take(canvas.size());
    rows = own.take(4 * g.pw * g.co);
  }
};

template <class R>
class DataBlock {
 public:
  typedef Vector<R> V;
  typedef DataScratch<R> Scratch;

  static executor::Sizes sizes(const Shape& s, const Geometry<R>& g) {
    executor::Sizes sizes{};
    Arena<R> saved(nullptr), saved_dot(nullptr);
    DataSaved<R>(g, saved);
    DataSavedDot<R>(g, saved_dot);
    const auto room = Room<R>::template of<DataScratch<R>>(nullptr, 1, s, g);
    sizes.y = g.n * g.pooled();
    sizes.saved = saved.used;
    sizes.saved_dot = saved_dot.used;
    sizes.scratch = room.common;
    sizes.thread_scratch = room.own;
    return sizes;
  }

  DataBlock(const Shape& s, const Geometry<R>& g, const executor::Primal<R>& p, R* memory)
      : s_(s), g_(g), p_(p), act_(s), room_(Room<R>::template of<Scratch>(memory, p.threads, s, g)), kept_(p.saved),
        saved_(g, kept_), scratch_(room_.template at<Scratch>(0, s, g)) {
    panel_offsets(scratch_.canvas, s, false, scratch_.offset);
    for (int seat = 0; seat < room_.threads; ++seat) {
      Scratch own = room_.template at<Scratch>(seat, s, g);
      fill_zero(own.painted, own.canvas.size());
      own.patches.prepare_own();
    }
  }

  void forward() {
    scratch_.patches.centre_on(p_.x[0]);
    for_each_stretch(g_.h, [&](Scratch& own, std::int64_t part, bool starts, std::int64_t, std::int64_t first,
                               std::int64_t last) {
      if (starts) own.patches.start(part);
      own.patches.include(part, own.painted, own.offset, first, last);
    });
    scratch_.patches.finish(saved_.patch_mean, saved_.covariance);
    find_statistics();
    coefficients(s_, g_, saved_.statistics, p_.w, scratch_.k);
    for_each_row(p_.w[0], [&](const R* rows, std::int64_t at) {
      in_blocks<R>(g_.co, [&](auto many, std::int64_t c) { forward_row<decltype(many)::value>(rows, at, c); });
    });
  }

  void backward() {
    const Statistics<R>& st = saved_.statistics;
    sum_over_maxima(p_.dy, nullptr, nullptr, st.db, st.dg);
    for (std::int64_t i = 0; i < g_.weight(); ++i) saved_.s[i] = scratch_.s[i];
    for (std::int64_t c = 0; c < g_.co; ++c) {
      if (p_.dw[1] != nullptr) p_.dw[1][c] = 0;
      if (p_.dw[2] != nullptr) p_.dw[2][c] = st.dg[c];
      if (p_.dw[3] != nullptr) p_.dw[3][c] = st.db[c];
    }
    if (p_.dw[0] == nullptr) return;
    coefficients(s_, g_, st, p_.w, scratch_.k);
    for (std::int64_t r = 0; r < g_.panels(); ++r)
      for (std::int64_t c = 0; c < g_.co; ++c) p_.dw[0][r * g_.co + c] = scratch_.k.a[c] * centred_s(r, c);
  }

  void tangent(const executor::Tangent<R>& t) {
    const DataSavedDot<R> dot = saved_dot(t);
    const R* w_dot = t.w_dot[0];
    for (std::int64_t c = 0; c < g_.co; ++c) dot.statistics.mean[c] = dot.statistics.spread[c] = 0;
    for (std::int64_t r = 0; r < g_.panels() && w_dot != nullptr; ++r)
      for (std::int64_t c = 0; c < g_.co; ++c) {
        dot.statistics.mean[c] += w_dot[r * g_.co + c] * static_cast<R>(saved_.patch_mean[r]);
        dot.statistics.spread[c] += w_dot[r * g_.co + c] * saved_.q[r * g_.co + c];
      }
    for_each_row(w_dot, [&](const R* rows, std::int64_t at) {
      in_blocks<R>(g_.co, [&](auto many, std::int64_t c) { tangent_row<decltype(many)::value>(t, dot, rows, at, c); });
    });
  }

  void tangent_backward(const executor::Tangent<R>& t) {
    const Statistics<R>& st = saved_.statistics;
    const DataSavedDot<R> dot = saved_dot(t);
    sum_over_maxima(t.dy_dot, p_.dy, dot.x_dot, scratch_.db, scratch_.dg);
    for (std::int64_t c = 0; c < g_.co; ++c) {
      if (t.dw_dot[1] != nullptr) t.dw_dot[1][c] = 0;
      if (t.dw_dot[2] != nullptr) t.dw_dot[2][c] = scratch_.dg[c];
      if (t.dw_dot[3] != nullptr) t.dw_dot[3][c] = scratch_.db[c];
    }
    if (t.dw_dot[0] == nullptr) return;
    coefficients(s_, g_, st, p_.w, scratch_.k);
    multiply_covariance(t.w_dot[0]);
    for (std::int64_t r = 0; r < g_.panels(); ++r) {
      const R mean = static_cast<R>(saved_.patch_mean[r]);
      for (std::int64_t c = 0; c < g_.co; ++c) {
        const std::int64_t at = r * g_.co + c;
        const R a = scratch_.k.a[c], inverse = st.inverse[c], spread = dot.statistics.spread[c], q = saved_.q[at];
        const R gamma_dot = s_.affine ? entry(t.w_dot[2], c, R(0)) : R(0);
        const R q_dot = inverse * (static_cast<R>(scratch_.wide[at]) - spread * q);
        const R rest = scratch_.s[at] - scratch_.db[c] * mean - scratch_.dg[c] * q - st.dg[c] * q_dot;
        t.dw_dot[0][at] = inverse * (gamma_dot - a * spread) * centred_s(r, c) + a * rest;
      }
    }
  }

 private:
  DataSavedDot<R> saved_dot(const executor::Tangent<R>& t) const {
    Arena<R> arena(t.saved_dot);
    return DataSavedDot<R>(g_, arena);
  }

  R centred_s(std::int64_t r, std::int64_t c) const {  // T
    const std::int64_t at = r * g_.co + c;
    const Statistics<R>& st = saved_.statistics;
    return saved_.s[at] - st.db[c] * static_cast<R>(saved_.patch_mean[r]) - st.dg[c] * saved_.q[at];
  }

  // wide = cov w; zero where w is null.
  void multiply_covariance(const R* w) {
    const std::int64_t rows = g_.panels(), co = g_.co;
    for (std::int64_t i = 0; i < rows * co; ++i) scratch_.wide[i] = 0;
    for (std::int64_t r = 0; r < rows && w != nullptr; ++r)
      for (std::int64_t j = 0; j < rows; ++j) {
        const double factor = saved_.covariance[r * rows + j];
        for (std::int64_t c = 0; c < co; ++c) scratch_.wide[r * co + c] += factor * static_cast<double>(w[j * co + c]);
      }
  }

  void find_statistics() {
    const Statistics<R>& st = saved_.statistics;
    multiply_covariance(p_.w[0]);
    for (std::int64_t c = 0; c < g_.co; ++c) {
      double mean = 0, variance = 0;
      for (std::int64_t r = 0; r < g_.panels(); ++r) {
        const double w = static_cast<double>(p_.w[0][r * g_.co + c]);
        mean += w * saved_.patch_mean[r];
        variance += w * scratch_.wide[r * g_.co + c];
      }
      const double inverse = c < g_.out ? 1 / square_root((variance > 0 ? variance : 0) + s_.eps) : 0;
      st.mean[c] = static_cast<R>(mean);
      st.inverse[c] = static_cast<R>(inverse);
      for (std::int64_t r = 0; r < g_.panels(); ++r)
        saved_.q[r * g_.co + c] = static_cast<R>(inverse * scratch_.wide[r * g_.co + c]);
    }
  }

  // All rows of the images, `height` each, in parts that threads share out: use(what a thread sees, part, whether this
  // is the part's first image, image, its first row, the one behind its last); what these need of the image is painted.
  template <class Use>
  void for_each_stretch(std::int64_t height, Use use) {
    const std::int64_t parts = data_parts(g_), all = g_.n * height, rows = height == g_.h ? 1 : 2;
    parallel_for(parts, room_.threads, [&](std::int64_t first, std::int64_t last, int seat) {
      Scratch own = room_.template at<Scratch>(seat, s_, g_);
      for (std::int64_t part = first; part < last; ++part) {
        const std::int64_t begin = all * part / parts, end = all * (part + 1) / parts;
        for (std::int64_t at = begin; at < end;) {
          const std::int64_t image = at / height, upper = at % height, lower = minimum(height, upper + end - at);
          paint_data(own.canvas, p_.x[0] + image * g_.image(), g_.height, g_.width, rows * upper,
                     own.canvas.rows - g_.h + rows * lower, own.painted);
          use(own, part, at == begin, image, upper, lower);
          at += lower - upper;
        }
      }
    });
  }

  // visit(two rows of the convolution with w, place of their maxima in a pooled tensor); zeros where w is null.
  template <class Visit>
  void for_each_row(const R* w, Visit visit) {
    for_each_stretch(g_.ph, [&](Scratch& own, std::int64_t, bool, std::int64_t image, std::int64_t first,
                                std::int64_t last) {
      if (w == nullptr) fill_zero(own.rows, 4 * g_.pw * g_.co);
      for (std::int64_t py = first; py < last; ++py) {
        if (w != nullptr) {
          const R* painted = own.painted + 2 * py * own.canvas.row();
          multiply(Product<R>{painted, 0, own.canvas.row(), own.offset, g_.panels(), w, g_.co, own.rows, 0,
                              2 * g_.pw * g_.co, g_.co, 1, 2, 2 * g_.pw, g_.co, false},
                   1);
        }
        visit(own.rows, (image * g_.ph + py) * g_.pw * g_.co);
      }
    });
  }

  template <int many>
  void forward_row(const R* rows, std::int64_t at, std::int64_t c) {
    V mean[many], a[many], b[many], inverse[many];
    for (int j = 0; j < many; ++j) {
      mean[j] = load(scratch_.k.mean + c + j * width<R>);
      a[j] = load(scratch_.k.a + c + j * width<R>);
      b[j] = load(scratch_.k.b + c + j * width<R>);
      inverse[j] = load(saved_.statistics.inverse + c + j * width<R>);
    }
    const R *upper = rows + c, *lower = upper + 2 * g_.pw * g_.co;
    at += c;
    for (std::int64_t px = 0; px < g_.pw; ++px, at += g_.co, upper += 2 * g_.co, lower += 2 * g_.co)
#pragma GCC unroll 4
      for (int j = 0; j < many; ++j) {
        const R* const pixels[] = {upper, upper + g_.co, lower, lower + g_.co};
        // The activation grows with u, so the largest u is found; a NaN would be in all u of a channel.
        V centred = load(pixels[0] + j * width<R>) - mean[j], best = centred * a[j] + b[j];
        Mask<R> code{};
#pragma GCC unroll 4
        for (int i = 1; i < 4; ++i) {
          const V z = load(pixels[i] + j * width<R>) - mean[j], u = z * a[j] + b[j];
          const Mask<R> take = u > best;
          best = select<R>(take, u, best);
          centred = select<R>(take, z, centred);
          code = take ? splat_mask<R>(i) : code;
        }
        code = best > 0 ? code : code + splat_mask<R>(below_zero);
        store(p_.y + at + j * width<R>, act_.value(best));
        store(saved_.x + at + j * width<R>, centred * inverse[j]);
        store_bytes<R>(saved_.codes + at + j * width<R>, code);
      }
  }

  template <int many>
  void tangent_row(const executor::Tangent<R>& t, const DataSavedDot<R>& dot, const R* rows, std::int64_t at,
                   std::int64_t c) {
    V mean[many], spread[many], inverse[many], gamma[many], gamma_dot[many], beta_dot[many];
    const auto pick = [&](const R* w, int j, R otherwise) {
      return w == nullptr ? splat<R>(otherwise) : load(w + c + j * width<R>);
    };
    for (int j = 0; j < many; ++j) {
      mean[j] = pick(dot.statistics.mean, j, 0);
      spread[j] = pick(dot.statistics.spread, j, 0);
      inverse[j] = pick(saved_.statistics.inverse, j, 0);
      gamma[j] = pick(s_.affine ? p_.w[2] : nullptr, j, 1);
      gamma_dot[j] = pick(s_.affine ? t.w_dot[2] : nullptr, j, 0);
      beta_dot[j] = pick(s_.affine ? t.w_dot[3] : nullptr, j, 0);
    }
    const R *upper = rows + c, *lower = upper + 2 * g_.pw * g_.co;
    at += c;
    for (std::int64_t px = 0; px < g_.pw; ++px, at += g_.co, upper += 2 * g_.co, lower += 2 * g_.co)
#pragma GCC unroll 4
      for (int j = 0; j < many; ++j) {
        const Mask<R> code = load_bytes<R>(saved_.codes + at + j * width<R>);
        const Mask<R> position = code & splat_mask<R>(below_zero - 1);
        const R* const pixels[] = {upper, upper + g_.co, lower, lower + g_.co};
        V z_dot = load(pixels[0] + j * width<R>);
#pragma GCC unroll 4
        for (int i = 1; i < 4; ++i)
          z_dot = select<R>(position == splat_mask<R>(i), load(pixels[i] + j * width<R>), z_dot);
        const V x = load(saved_.x + at + j * width<R>), x_dot = inverse[j] * (z_dot - mean[j] - x * spread[j]);
        store(dot.x_dot + at + j * width<R>, x_dot);
        store(t.y_dot + at + j * width<R>, slope(code) * (gamma[j] * x_dot + gamma_dot[j] * x + beta_dot[j]));
      }
  }

  FASTMETA_INLINE V slope(Mask<R> code) const {
    return select<R>(code < splat_mask<R>(below_zero), splat<R>(1), act_.slope_below);
  }

  // With dv = slope d, left in `rows` as maxima.h or outer.h take it: db = sum dv, dg = sum of dv x (and of slope e x_dot, if there are e and x_dot), and in scratch
  // s = sum of dv P.
  void sum_over_maxima(const R* d, const R* e, const R* x_dot, R* db, R* dg) {
    [[maybe_unused]] const std::int64_t row = 2 * g_.pw * g_.co;
    for_each_stretch(g_.ph, [&](Scratch& own, std::int64_t part, bool starts, std::int64_t image, std::int64_t first,
                                std::int64_t last) {
      double *sum = own.sum + part * g_.co, *spread = own.spread + part * g_.co;
      if (starts) {
        fill_zero(sum, g_.co);
        fill_zero(spread, g_.co);
      }
      for (std::int64_t py = first; py < last; ++py) {
        const std::int64_t at = (image * g_.ph + py) * g_.pw * g_.co;
        in_blocks<R>(g_.co, [&](auto many, std::int64_t c) {
          spread_row<decltype(many)::value>(d, e, x_dot, own.rows, sum, spread, at, c);
        });
        const R* const painted = own.painted + 2 * py * own.canvas.row();
        R* const sums = own.s + part * g_.weight();
        const bool add = !starts || py > first;
        if constexpr (lanes_pick<R>) {
          const Maxima<R> o{own.canvas.row(), own.rows, saved_.codes + at, g_.pw, g_.co, g_.co, add};
          outer_at_maxima(o, painted, own.offset, g_.panels(), sums);
        } else {
          const Outer<R> o{{}, 0, own.canvas.row(), 1, own.rows, 0, row, g_.co, width<R>, 1, 2, 2 * g_.pw, nullptr,
                           g_.co, add};
          outer_scattered(o, painted, own.offset, g_.panels(), sums, g_.co);
        }
      }
    });
    for (std::int64_t part = 1; part < data_parts(g_); ++part) {
      for (std::int64_t c = 0; c < g_.co; ++c) {
        scratch_.sum[c] += scratch_.sum[part * g_.co + c];
        scratch_.spread[c] += scratch_.spread[part * g_.co + c];
      }
      for (std::int64_t i = 0; i < g_.weight(); ++i) scratch_.s[i] += scratch_.s[part * g_.weight() + i];
    }
    for (std::int64_t c = 0; c < g_.co; ++c) {
      db[c] = static_cast<R>(scratch_.sum[c]);
      dg[c] = static_cast<R>(scratch_.spread[c]);
    }
  }

  template <int many>
  void spread_row(const R* d, const R* e, const R* x_dot, R* rows, double* sum, double* spread, std::int64_t at,
                  std::int64_t c) const {
    V total[many] = {}, product[many] = {};
    [[maybe_unused]] R *upper = rows + c, *lower = upper + 2 * g_.pw * g_.co;
    at += c;
    for (std::int64_t px = 0; px < g_.pw; ++px, at += g_.co, upper += 2 * g_.co, lower += 2 * g_.co)
#pragma GCC unroll 4
      for (int j = 0; j < many; ++j) {
        const std::int64_t here = at + j * width<R>;
        const Mask<R> code = load_bytes<R>(saved_.codes + here);
        [[maybe_unused]] const Mask<R> position = code & splat_mask<R>(below_zero - 1);
        const V f = slope(code), dv = f * load(d + here);
        if constexpr (lanes_pick<R>) {
          store(rows + c + px * g_.co + j * width<R>, dv);
        } else {
          R* const pixels[] = {upper, upper + g_.co, lower, lower + g_.co};
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) store(pixels[i] + j * width<R>, select<R>(position == splat_mask<R>(i), dv, V{}));
        }
        total[j] += dv;
        product[j] += dv * load(saved_.x + here);
        if (e != nullptr) product[j] += f * load(e + here) * load(x_dot + here);
      }
    for (int j = 0; j < many; ++j) {
      accumulate<R>(sum + c + j * width<R>, total[j]);
      accumulate<R>(spread + c + j * width<R>, product[j]);
    }
  }

  const Shape& s_;
  const Geometry<R>& g_;
  const executor::Primal<R>& p_;
  Piecewise<R> act_;
  Room<R> room_;
  Arena<R> kept_;
  DataSaved<R> saved_;
  Scratch scratch_;  // as the caller's thread sees it
};

}  // namespace
}  // namespace fastmeta::conv_block
