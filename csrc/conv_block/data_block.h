// The four maps of a block on a task's data, batch norm, a piecewise linear activation and 2x2 maxima: the first layer.
//
// It is the largest layer and the cheapest to compute, so the convolution's result z = w^T P is made a few rows at a
// time and never stored, nor is any image of its size kept but where the maxima are. What z would be needed for follows
// from mean and covariance of the patches P (patches.h) and from S, the sum of dv P over the maxima. With x for
// normalised z, (z - mean z) / s, and Q = cov(P) w / s,
//   u = (a w)^T P + b - a mean z               u_dot = (a w_dot + a_dot w)^T P + b_dot - a mean z_dot - a_dot mean z
//   mean z_dot = w_dot^T mean P                mean(x z_dot) = w_dot^T Q
//   dg = sum dv x = (w^T S - db mean z) / s    sum dv x_dot = (w_dot^T S - db mean z_dot - mean(x z_dot) dg) / s
//   d_w = a T, T = S - db mean P - dg Q        d_w_dot = a_dot T + a (S_dot - db_dot mean P - dg_dot Q - dg Q_dot)
#pragma once

#include "convolve.h"
#include "maxima.h"
#include "passes.h"
#include "patches.h"

namespace fastmeta::conv_block {
namespace {

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
  R *q, *s;
  std::uint8_t* codes;  // of the maxima

  DataSaved(const Geometry<R>& g, Arena<R>& arena) : statistics(g, arena) {
    patch_mean = arena.template take_as<double>(g.panels());
    covariance = arena.template take_as<double>(g.panels() * g.panels());
    q = arena.take(g.weight());
    s = arena.take(g.weight());
    codes = arena.template take_as<std::uint8_t>(g.n * g.pooled());
  }
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
  R* w;                          // with which the convolution yields u, or u_dot, but for a constant
  R *constant, *a_dot;
  double *wide, *dv_x;           // [rows of the weight, co]; the sum of dv x
  double *sum, *sums;            // of dv [parts, co], of dv P [parts, rows of the weight, co]
  R *painted, *rows, *products;  // a thread's own: an image, two rows of z or of dv, sums of dv P of some rows
  DataScratch(const Shape& shape, const Geometry<R>& g, Arena<R>& common, Arena<R>& own)
      : canvas(canvas_of_input(shape, g)), offset(common.template take_as<std::int64_t>(g.panels())),
        patches(canvas, shape, g, data_parts(g), common, own) {
    const std::int64_t parts = data_parts(g);
    k = {common.take(g.co), common.take(g.co), common.take(g.co)};
    w = common.take(g.weight());
    constant = common.take(g.co);
    a_dot = common.take(g.co);
    wide = common.template take_as<double>(g.weight());
    dv_x = common.template take_as<double>(g.co);
    sum = common.template take_as<double>(parts * g.co);
    sums = common.template take_as<double>(parts * g.weight());
    painted = own.take(canvas.size());
    rows = own.take(4 * g.pw * g.co);
    products = own.take(g.weight());
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
    StatisticsDot<R>(g, saved_dot);
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
    }
  }

  void forward() {
    scratch_.patches.prepare(p_.x[0]);
    for (int seat = 0; seat < room_.threads; ++seat) room_.template at<Scratch>(seat, s_, g_).patches.prepare_own();
    for_each_stretch(g_.h, [&](Scratch& own, std::int64_t part, bool starts, std::int64_t, std::int64_t first,
                               std::int64_t last) {
      if (starts) own.patches.start(part);
      own.patches.include(part, own.painted, first, last);
    });
    scratch_.patches.finish(saved_.patch_mean, saved_.covariance);
    find_statistics();
    coefficients(s_, g_, saved_.statistics, p_.w, scratch_.k);
    const Affine<R>& k = scratch_.k;
    for (std::int64_t r = 0; r < g_.panels(); ++r)
      for (std::int64_t c = 0; c < g_.co; ++c) scratch_.w[r * g_.co + c] = k.a[c] * p_.w[0][r * g_.co + c];
    for (std::int64_t c = 0; c < g_.co; ++c) scratch_.constant[c] = k.b[c] - k.a[c] * k.mean[c];
    for_each_row([&](const R* rows, std::int64_t at) {
      in_blocks<R>(g_.co, [&](auto many, std::int64_t c) { forward_row<decltype(many)::value>(rows, at, c); });
    });
  }

  void backward() {
    const Statistics<R>& st = saved_.statistics;
    sum_over_maxima(p_.dy);
    find_dv_x();
    for (std::int64_t i = 0; i < g_.weight(); ++i) saved_.s[i] = static_cast<R>(scratch_.sums[i]);
    for (std::int64_t c = 0; c < g_.co; ++c) {
      st.db[c] = static_cast<R>(scratch_.sum[c]);
      st.dg[c] = static_cast<R>(scratch_.dv_x[c]);
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
    const StatisticsDot<R> dot = statistics_dot(t);
    const R* w_dot = t.w_dot[0];
    for (std::int64_t c = 0; c < g_.co; ++c) dot.mean[c] = dot.spread[c] = 0;
    for (std::int64_t r = 0; r < g_.panels() && w_dot != nullptr; ++r)
      for (std::int64_t c = 0; c < g_.co; ++c) {
        dot.mean[c] += w_dot[r * g_.co + c] * static_cast<R>(saved_.patch_mean[r]);
        dot.spread[c] += w_dot[r * g_.co + c] * saved_.q[r * g_.co + c];
      }
    find_a_dot(t, dot);
    const Affine<R>& k = scratch_.k;
    for (std::int64_t r = 0; r < g_.panels(); ++r)
      for (std::int64_t c = 0; c < g_.co; ++c) {
        const std::int64_t at = r * g_.co + c;
        scratch_.w[at] = k.a[c] * entry(w_dot, at, R(0)) + scratch_.a_dot[c] * p_.w[0][at];
      }
    for (std::int64_t c = 0; c < g_.co; ++c) {
      const R beta_dot = s_.affine ? entry(t.w_dot[3], c, R(0)) : R(0);
      scratch_.constant[c] = beta_dot - k.a[c] * dot.mean[c] - scratch_.a_dot[c] * k.mean[c];
    }
    for_each_row([&](const R* rows, std::int64_t at) {
      in_blocks<R>(g_.co, [&](auto many, std::int64_t c) { tangent_row<decltype(many)::value>(t, rows, at, c); });
    });
  }

  void tangent_backward(const executor::Tangent<R>& t) {
    const Statistics<R>& st = saved_.statistics;
    const StatisticsDot<R> dot = statistics_dot(t);
    sum_over_maxima(t.dy_dot);
    find_dv_x();
    for (std::int64_t r = 0; r < g_.panels() && t.w_dot[0] != nullptr; ++r)  // with it dv x_dot is summed
      for (std::int64_t c = 0; c < g_.co; ++c) {
        const std::int64_t at = r * g_.co + c;
        scratch_.dv_x[c] += static_cast<double>(t.w_dot[0][at]) * static_cast<double>(saved_.s[at]) * inverse(c);
      }
    const double *db_dot = scratch_.sum, *dg_dot = scratch_.dv_x;
    for (std::int64_t c = 0; c < g_.co; ++c) {
      const double db = static_cast<double>(st.db[c]), dg = static_cast<double>(st.dg[c]);
      scratch_.dv_x[c] -= inverse(c) * (db * static_cast<double>(dot.mean[c]) + dg * static_cast<double>(dot.spread[c]));
      if (t.dw_dot[1] != nullptr) t.dw_dot[1][c] = 0;
      if (t.dw_dot[2] != nullptr) t.dw_dot[2][c] = static_cast<R>(dg_dot[c]);
      if (t.dw_dot[3] != nullptr) t.dw_dot[3][c] = static_cast<R>(db_dot[c]);
    }
    if (t.dw_dot[0] == nullptr) return;
    find_a_dot(t, dot);
    multiply_covariance(t.w_dot[0]);
    for (std::int64_t r = 0; r < g_.panels(); ++r)
      for (std::int64_t c = 0; c < g_.co; ++c) {
        const std::int64_t at = r * g_.co + c;
        const double q = static_cast<double>(saved_.q[at]), dg = static_cast<double>(st.dg[c]);
        const double q_dot = inverse(c) * (scratch_.wide[at] - static_cast<double>(dot.spread[c]) * q);
        const double rest = scratch_.sums[at] - db_dot[c] * saved_.patch_mean[r] - dg_dot[c] * q - dg * q_dot;
        t.dw_dot[0][at] = scratch_.a_dot[c] * centred_s(r, c) + scratch_.k.a[c] * static_cast<R>(rest);
      }
  }

 private:
  StatisticsDot<R> statistics_dot(const executor::Tangent<R>& t) const {
    Arena<R> arena(t.saved_dot);
    return StatisticsDot<R>(g_, arena);
  }

  double inverse(std::int64_t c) const { return static_cast<double>(saved_.statistics.inverse[c]); }

  // k, and the tangent of its a = gamma / s.
  void find_a_dot(const executor::Tangent<R>& t, const StatisticsDot<R>& dot) const {
    coefficients(s_, g_, saved_.statistics, p_.w, scratch_.k);
    for (std::int64_t c = 0; c < g_.co; ++c) {
      const R gamma_dot = s_.affine ? entry(t.w_dot[2], c, R(0)) : R(0);
      scratch_.a_dot[c] = saved_.statistics.inverse[c] * (gamma_dot - scratch_.k.a[c] * dot.spread[c]);
    }
  }

  // The sum of dv x from those of dv and dv P.
  void find_dv_x() const {
    double* const total = scratch_.dv_x;
    for (std::int64_t c = 0; c < g_.co; ++c)
      total[c] = -scratch_.sum[c] * static_cast<double>(saved_.statistics.mean[c]);
    for (std::int64_t r = 0; r < g_.panels(); ++r)
      for (std::int64_t c = 0; c < g_.co; ++c)
        total[c] += static_cast<double>(p_.w[0][r * g_.co + c]) * scratch_.sums[r * g_.co + c];
    for (std::int64_t c = 0; c < g_.co; ++c) total[c] *= inverse(c);
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

  // visit(two rows of the convolution with scratch's w, place of their maxima in a pooled tensor)
  template <class Visit>
  void for_each_row(Visit visit) {
    for_each_stretch(g_.ph, [&](Scratch& own, std::int64_t, bool, std::int64_t image, std::int64_t first,
                                std::int64_t last) {
      for (std::int64_t py = first; py < last; ++py) {
        const R* painted = own.painted + 2 * py * own.canvas.row();
        multiply(Product<R>{painted, 0, own.canvas.row(), own.offset, g_.panels(), own.w, g_.co, own.rows, 0,
                            2 * g_.pw * g_.co, g_.co, 1, 2, 2 * g_.pw, g_.co, false},
                 1);
        visit(own.rows, (image * g_.ph + py) * g_.pw * g_.co);
      }
    });
  }

  template <int many>
  void forward_row(const R* rows, std::int64_t at, std::int64_t c) {
    V constant[many];
    for (int j = 0; j < many; ++j) constant[j] = load(scratch_.constant + c + j * width<R>);
    const R *upper = rows + c, *lower = upper + 2 * g_.pw * g_.co;
    at += c;
    for (std::int64_t px = 0; px < g_.pw; ++px, at += g_.co, upper += 2 * g_.co, lower += 2 * g_.co)
#pragma GCC unroll 4
      for (int j = 0; j < many; ++j) {
        // The activation grows with u, so the largest u is found; a NaN would be in all u of a channel.
        const V upper_left = load(upper + j * width<R>), upper_right = load(upper + g_.co + j * width<R>);
        const V lower_left = load(lower + j * width<R>), lower_right = load(lower + g_.co + j * width<R>);
        const Mask<R> right_above = upper_right > upper_left, right_below = lower_right > lower_left;
        const V above = right_above ? upper_right : upper_left, below = right_below ? lower_right : lower_left;
        const Mask<R> lower_row = below > above;
        const V u = (lower_row ? below : above) + constant[j];
        const Mask<R> right = (lower_row ? right_below : right_above) & splat_mask<R>(1);
        const Mask<R> code = right | (lower_row & splat_mask<R>(2)) | (u > 0 ? Mask<R>{} : splat_mask<R>(below_zero));
        store(p_.y + at + j * width<R>, act_.value(u));
        store_bytes<R>(saved_.codes + at + j * width<R>, code);
      }
  }

  template <int many>
  void tangent_row(const executor::Tangent<R>& t, const R* rows, std::int64_t at, std::int64_t c) {
    V constant[many];
    for (int j = 0; j < many; ++j) constant[j] = load(scratch_.constant + c + j * width<R>);
    const R *upper = rows + c, *lower = upper + 2 * g_.pw * g_.co;
    at += c;
    for (std::int64_t px = 0; px < g_.pw; ++px, at += g_.co, upper += 2 * g_.co, lower += 2 * g_.co)
#pragma GCC unroll 4
      for (int j = 0; j < many; ++j) {
        const Mask<R> code = load_bytes<R>(saved_.codes + at + j * width<R>);
        const Mask<R> position = code & splat_mask<R>(below_zero - 1);
        const R* const pixels[] = {upper, upper + g_.co, lower, lower + g_.co};
        V u_dot = load(pixels[0] + j * width<R>);
#pragma GCC unroll 4
        for (int i = 1; i < 4; ++i)
          u_dot = select<R>(position == splat_mask<R>(i), load(pixels[i] + j * width<R>), u_dot);
        store(t.y_dot + at + j * width<R>, slope(code) * (u_dot + constant[j]));
      }
  }

  FASTMETA_INLINE V slope(Mask<R> code) const {
    return select<R>(code < splat_mask<R>(below_zero), splat<R>(1), act_.slope_below);
  }

  // In scratch, with dv = slope d: the sums of dv and of dv P.
  void sum_over_maxima(const R* d) {
    [[maybe_unused]] const std::int64_t row = 2 * g_.pw * g_.co;
    const std::int64_t weight = g_.weight();
    for_each_stretch(g_.ph, [&](Scratch& own, std::int64_t part, bool starts, std::int64_t image, std::int64_t first,
                                std::int64_t last) {
      double *sum = own.sum + part * g_.co, *sums = own.sums + part * weight;
      if (starts) {
        fill_zero(sum, g_.co);
        fill_zero(sums, weight);
      }
      for (std::int64_t py = first; py < last; ++py) {
        const std::int64_t at = (image * g_.ph + py) * g_.pw * g_.co;
        in_blocks<R>(g_.co, [&](auto many, std::int64_t c) {
          spread_row<decltype(many)::value>(d, own.rows, sum, at, c);
        });
        const R* const painted = own.painted + 2 * py * own.canvas.row();
        if constexpr (lanes_pick<R>) {
          const Maxima<R> o{own.canvas.row(), own.rows, saved_.codes + at, g_.pw, g_.co, g_.co, py > first};
          outer_at_maxima(o, painted, own.offset, g_.panels(), own.products);
        } else {
          const Outer<R> o{{}, 0, own.canvas.row(), 1, own.rows, 0, row, g_.co, width<R>, 1, 2, 2 * g_.pw, nullptr,
                           g_.co, py > first};
          outer_scattered(o, painted, own.offset, g_.panels(), own.products, g_.co);
        }
      }
      for (std::int64_t i = 0; i < weight; i += width<R>) accumulate<R>(sums + i, load(own.products + i));
    });
    for (std::int64_t part = 1; part < data_parts(g_); ++part) {
      for (std::int64_t c = 0; c < g_.co; ++c) scratch_.sum[c] += scratch_.sum[part * g_.co + c];
      for (std::int64_t i = 0; i < weight; ++i) scratch_.sums[i] += scratch_.sums[part * weight + i];
    }
  }

  // dv, left in `rows` as maxima.h or outer.h take it, and its sum.
  template <int many>
  void spread_row(const R* d, R* rows, double* sum, std::int64_t at, std::int64_t c) const {
    V total[many] = {};
    [[maybe_unused]] R *upper = rows + c, *lower = upper + 2 * g_.pw * g_.co;
    at += c;
    for (std::int64_t px = 0; px < g_.pw; ++px, at += g_.co, upper += 2 * g_.co, lower += 2 * g_.co)
#pragma GCC unroll 4
      for (int j = 0; j < many; ++j) {
        const Mask<R> code = load_bytes<R>(saved_.codes + at + j * width<R>);
        const V dv = slope(code) * load(d + at + j * width<R>);
        if constexpr (lanes_pick<R>) {
          store(rows + c + px * g_.co + j * width<R>, dv);
        } else {
          const Mask<R> position = code & splat_mask<R>(below_zero - 1);
          R* const pixels[] = {upper, upper + g_.co, lower, lower + g_.co};
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) store(pixels[i] + j * width<R>, select<R>(position == splat_mask<R>(i), dv, V{}));
        }
        total[j] += dv;
      }
    for (int j = 0; j < many; ++j) accumulate<R>(sum + c + j * width<R>, total[j]);
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
