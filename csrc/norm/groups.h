// Sums over the pixels of one sample, and what follows from them by group and by channel.
#pragma once

#include "../common/kept_rows.h"
#include "../common/vectors.h"
#include "kernels.h"

namespace fastmeta::norm {
namespace {

using executor::Primal;
using executor::Sizes;
using executor::Tangent;

template <class R>
struct Layout {
  const Shape& s;
  std::int64_t samples, co, size, per;  // at work; padded channels; elements of a sample; channels of a group
  double share;                // 1 / values of a group; 0 where statistics do not depend on them

  explicit Layout(const void* shape, const void* kept = nullptr)
      : s(*static_cast<const Shape*>(shape)),
        samples(rows_at_work(kept, s.sequences, s.samples)),
        co(padded<R>(s.channels)),
        size(s.pixels * co),
        per(s.channels / s.groups),
        share(s.running ? 0 : 1 / static_cast<double>(per * s.pixels)) {}
};

// Numbers by group, of all samples, one kind after the other.
template <class R, int kinds>
struct ByGroup {
  R* of[kinds];

  static std::int64_t elements(const Layout<R>& l) { return kinds * l.s.samples * l.s.groups; }
  ByGroup(const Layout<R>& l, R* memory, std::int64_t sample) {
    for (int i = 0; i < kinds; ++i) of[i] = memory + (i * l.s.samples + sample) * l.s.groups;
  }
};

// What forward and backward leave: mean of z, 1 / s, and with d the cotangent of x the means of d and of d x.
template <class R>
struct Saved : ByGroup<R, 4> {
  using ByGroup<R, 4>::ByGroup;
  R* mean() const { return this->of[0]; }
  R* inverse() const { return this->of[1]; }
  R* d_mean() const { return this->of[2]; }
  R* d_spread() const { return this->of[3]; }
};

// What tangent leaves: means of z_dot and of x z_dot.
template <class R>
struct SavedDot : ByGroup<R, 2> {
  using ByGroup<R, 2>::ByGroup;
  R* mean() const { return this->of[0]; }
  R* spread() const { return this->of[1]; }
};

template <class R, int count>
struct Terms {
  Vector<R> of[count];
};

// A cotangent and its tangent.
template <class R>
struct Both {
  Vector<R> value, dot;
};

// A channel's number in double, or those of a few neighbours side by side.
struct One {
  std::int64_t c;
  template <class T>
  FASTMETA_INLINE double operator()(const T* p) const {
    return static_cast<double>(p[c]);
  }
};
struct Few {
  static constexpr int count = width<double>;
  std::int64_t c;
  template <class T>
  FASTMETA_INLINE Vector<double> operator()(const T* p) const {
    typedef T Narrow __attribute__((vector_size(count * sizeof(T))));
    Narrow narrow;
    __builtin_memcpy(&narrow, p + c, sizeof narrow);
    return __builtin_convertvector(narrow, Vector<double>);
  }
};

// Scratch of every map, by channel; padding is zero.
template <class R>
struct Scratch {
  static constexpr int sums_of_sample = 4, sums_of_task = 2, kinds = 10;
  const Layout<R>& l;
  double *sums[sums_of_sample], *totals[sums_of_task];
  R *ones, *zeros;
  R *mean, *inverse, *mean_dot, *spread_dot, *d_mean, *d_spread, *d_mean_dot, *d_spread_dot;

  static std::int64_t elements(const Layout<R>& l) {
    constexpr std::int64_t wide = sizeof(double) / sizeof(R);
    return l.co * ((sums_of_sample + sums_of_task) * wide + kinds);
  }

  Scratch(const Layout<R>& layout, R* memory) : l(layout) {
    __builtin_memset(memory, 0, static_cast<std::size_t>(elements(l)) * sizeof(R));
    auto* wide = reinterpret_cast<double*>(memory);
    for (double*& place : sums) place = wide, wide += l.co;
    for (double*& place : totals) place = wide, wide += l.co;
    auto* narrow = reinterpret_cast<R*>(wide);
    R** const all[] = {&ones,       &zeros,  &mean,     &inverse,    &mean_dot,
                       &spread_dot, &d_mean, &d_spread, &d_mean_dot, &d_spread_dot};
    for (R** place : all) *place = narrow, narrow += l.co;
    for (std::int64_t c = 0; c < l.s.channels; ++c) ones[c] = 1;
  }

  // sums[i] = over the pixels of a sample, what term(at) gives at each, where prepare(c) makes `term` for a vector of
  // channels. Rounding stays that of a few pixels: their sum is added in double.
  template <int count, class Prepare>
  FASTMETA_INLINE void sum_pixels(Prepare prepare) const {
    constexpr std::int64_t few = 32;
    for (int i = 0; i < count; ++i) fill_zero(sums[i], l.co);
    for (std::int64_t c = 0; c < l.co; c += width<R>) {
      const auto term = prepare(c);
      for (std::int64_t first = 0; first < l.s.pixels; first += few) {
        Terms<R, count> part{};
        for (std::int64_t p = first; p < minimum(l.s.pixels, first + few); ++p) {
          const Terms<R, count> here = term(p * l.co + c);
          for (int i = 0; i < count; ++i) part.of[i] += here.of[i];
        }
        for (int i = 0; i < count; ++i) accumulate<R>(sums[i] + c, part.of[i]);
      }
    }
  }

  // out[g] = finish(the sum over the group's channels of value(at), g), and by channel; at(p) is a channel's entry of
  // p.
  template <class Value, class Finish>
  FASTMETA_INLINE void by_group(R* out, R* by_channel, Value value, Finish finish) const {
    for (std::int64_t g = 0; g < l.s.groups; ++g) {
      const std::int64_t end = (g + 1) * l.per;
      std::int64_t c = g * l.per;
      Vector<double> part{};
      for (; c + Few::count <= end; c += Few::count) part += value(Few{c});
      double total = sum<double>(part);
      for (; c < end; ++c) total += value(One{c});
      const R result = static_cast<R>(finish(total, g));
      if (out != nullptr) out[g] = result;
      for (c = g * l.per; c < end; ++c) by_channel[c] = result;
    }
  }

  void store_totals(R* const* dw) const {
    for (int i = 0; i < sums_of_task; ++i)
      for (std::int64_t c = 0; dw[i] != nullptr && c < l.co; ++c) dw[i][c] = static_cast<R>(totals[i][c]);
  }

  void spread(const R* by_group, R* by_channel) const {
    for (std::int64_t g = 0; g < l.s.groups; ++g)
      for (std::int64_t c = g * l.per; c < (g + 1) * l.per; ++c) by_channel[c] = by_group[g];
  }
};

}  // namespace
}  // namespace fastmeta::norm
