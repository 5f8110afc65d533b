// Mean and covariance of the patches of a task's data that a convolution's weight meets.
//
// The convolution's result is linear in them, so they give its batch statistics, and those of any tangent, without a
// look at the result: mean z = w^T mean P, var z = w^T cov P w.
//
// With X for the image and k, l for taps, the sum of P_ck P_c'l is that of X_c[p] X_c'[p + l - k] over the window of
// pixels p that tap k looks at. Such products depend on l - k alone, and the taps' windows differ in a few rows and
// columns. So each product is made once, summed with those of its rows and columns that lie in the same windows, and
// each pair of taps takes the sums that lie in its own.
#pragma once

#include "canvas.h"

namespace fastmeta::conv_block {
namespace {

constexpr std::int64_t max_patch = 32;    // rows of the weight: covariances grow with their square
constexpr std::int64_t patch_terms = 64;  // of a sum in registers
constexpr int most_channels = 4;          // multiplied side by side
constexpr int most_others = 7;            // with so many other places of the image: as many as registers hold

template <int channels>
constexpr int others_beside = channels == 1            ? most_others
                              : vector_registers == 32 ? (channels == 2 ? 6 : 4)
                                                       : (channels == 2 ? 4 : 5 - channels);

// sums[channel][other place] of the products of some rows, of vectors side by side. Not inlined, where it would lack
// registers.
template <class R, int channels, int others>
__attribute__((noinline)) void multiply_places(const R* from, std::int64_t plane, const R* const* places,
                                               std::int64_t rows, std::int64_t row, std::int64_t vectors, R* sums) {
  typedef Vector<R> V;
  const R *a[channels], *b[others];
  V total[channels][others] = {};
#pragma GCC unroll 4
  for (int i = 0; i < channels; ++i) a[i] = from + i * plane;
#pragma GCC unroll 7
  for (int j = 0; j < others; ++j) b[j] = places[j];
  for (std::int64_t y = 0; y < rows; ++y)
    for (std::int64_t at = y * row, end = at + vectors * width<R>; at < end; at += width<R>) {
      V x[channels];
#pragma GCC unroll 4
      for (int i = 0; i < channels; ++i) x[i] = load(a[i] + at);
#pragma GCC unroll 7
      for (int j = 0; j < others; ++j) {
        const V other = load(b[j] + at);
#pragma GCC unroll 4
        for (int i = 0; i < channels; ++i) total[i][j] += x[i] * other;
      }
    }
#pragma GCC unroll 4
  for (int i = 0; i < channels; ++i)
#pragma GCC unroll 7
    for (int j = 0; j < others; ++j) store(sums + (i * others + j) * width<R>, total[i][j]);
}

template <class R>
class Patches {
 public:
  Patches(const Canvas& c, const Shape& s, const Geometry<R>& g, std::int64_t parts, Arena<R>& common, Arena<R>& own)
      : canvas_(c), s_(s), g_(g), parts_(parts), rows_(g.panels()), reach_((s.kernel[0] - 1) * s.dilation[0]),
        others_(g.in * ((2 * s.kernel[0] - 1) * (2 * s.kernel[1] - 1) + 1) / 2 + 1),
        pairs_(g.in * g.in * g.taps * (g.taps + 1) / 2 + rows_),
        other_(common.template take_as<Other>(others_ + most_others)),
        sums_(common.template take_as<double>(parts * pairs_)), shift_(common.take(g.in)),
        products_(own.take(bands() * band_size())), centred_(own.take(room())) {
    if (centred_ != nullptr) centred_ += slack();
  }

  void prepare_own() {
    fill_zero(centred_ - slack(), room());
    for (std::int64_t i = 0; i < canvas_.plane() + slack(); ++i) centred_[canvas_.size() + i] = 1;
  }

  // Patches are shifted by about the mean of a typical image, so that little cancels when the mean is taken off.
  void prepare(const R* image) {
    const std::int64_t pixels = g_.height * g_.width;
    for (std::int64_t c = 0; c < g_.in; ++c) {
      const R *at = image + c * pixels, *const end = at + pixels;
      Vector<R> total{};
      for (; at + width<R> <= end; at += width<R>) total += load(at);
      R rest = sum<R>(total);
      for (; at < end; ++at) rest += *at;
      shift_[c] = rest / static_cast<R>(pixels);
    }
    Other* to = other_;
    for (std::int64_t dy = 0; dy < s_.kernel[0]; ++dy)
      for (std::int64_t c = 0; c < g_.in; ++c)
        for (std::int64_t dx = dy == 0 ? 0 : 1 - s_.kernel[1]; dx < s_.kernel[1]; ++dx)
          *to++ = {c * canvas_.plane() + dy * s_.dilation[0] * canvas_.row() + dx * s_.dilation[1], c, dy, dx};
    while (to < other_ + others_ + most_others) *to++ = {canvas_.size(), g_.in, 0, 0};  // products with one: sums
  }

  void start(std::int64_t part) { fill_zero(sums_ + part * pairs_, pairs_); }

  // The result's rows from `begin` to `end` of an image on the canvas, whose planes are no smaller than a vector.
  void include(std::int64_t part, const R* painted, std::int64_t begin, std::int64_t end) {
    centre(painted, begin * canvas_.row(), (end + reach_) * canvas_.row());
    fill_zero(products_, bands() * band_size());
    std::int64_t edge[2 * max_patch];
    find_edges(begin, end, edge);
    for (std::int64_t band = 0; band < bands(); ++band)
      add_band(edge[band], edge[band + 1], products_ + band * band_size());
    double* sums = sums_ + part * pairs_;
    for_each_pair([&](std::int64_t which, std::int64_t c, std::int64_t ky, std::int64_t kx) {
      Vector<R> total{};
      for (std::int64_t band = 0; band < bands(); ++band)
        if (edge[band] >= begin + ky * s_.dilation[0] && edge[band + 1] <= end + ky * s_.dilation[0])
          total += load(products_ + band * band_size() + product(which, kx, c));
      *sums++ += static_cast<double>(sum<R>(total));
    });
  }

  // mean [rows of the weight], covariance [rows, rows]
  void finish(double* mean, double* covariance) const {
    for (std::int64_t part = 1; part < parts_; ++part)
      for (std::int64_t i = 0; i < pairs_; ++i) sums_[i] += sums_[part * pairs_ + i];
    const double share = 1 / static_cast<double>(g_.count());
    const double* sums = sums_;
    for_each_pair([&](std::int64_t which, std::int64_t c, std::int64_t ky, std::int64_t kx) {
      const Other& o = other_[which];
      const std::int64_t k = c * g_.taps + ky * s_.kernel[1] + kx;
      const std::int64_t l = o.c * g_.taps + (ky + o.dy) * s_.kernel[1] + kx + o.dx;
      const double value = *sums++ * share;
      if (o.c == g_.in) {
        mean[k] = value;
      } else {
        covariance[k * rows_ + l] = covariance[l * rows_ + k] = value;
      }
    });
    for (std::int64_t a = 0; a < rows_; ++a)
      for (std::int64_t b = 0; b < rows_; ++b) covariance[a * rows_ + b] -= mean[a] * mean[b];
    for (std::int64_t a = 0; a < rows_; ++a) mean[a] += static_cast<double>(shift_[a / g_.taps]);
  }

 private:
  struct Other {
    std::int64_t at, c, dy, dx;  // from a pixel of the first channel; channel, and taps between the two
  };

  // Rows of the canvas that lie in the same taps' windows.
  std::int64_t bands() const { return 2 * s_.kernel[0] - 1; }
  std::int64_t band_size() const { return product(others_ + most_others, 0, 0); }
  std::int64_t product(std::int64_t which, std::int64_t kx, std::int64_t c) const {
    return ((which * s_.kernel[1] + kx) * g_.in + c) * width<R>;
  }
  // Pixels are read in whole vectors and also where no tap's window is, beyond the canvas.
  std::int64_t slack() const { return (reach_ + 1) * canvas_.row() + 2 * width<R>; }
  std::int64_t room() const { return canvas_.size() + canvas_.plane() + 2 * slack(); }

  // use(number of the other place, channel, tap) for every pair of a tap with one that is not before it, or with one.
  template <class Use>
  FASTMETA_INLINE void for_each_pair(Use use) const {
    for (std::int64_t which = 0; which < others_; ++which)
      for (std::int64_t c = 0; c < g_.in; ++c)
        for (std::int64_t ky = 0; ky + other_[which].dy < s_.kernel[0]; ++ky)
          for (std::int64_t kx = first_tap(which); kx < last_tap(which); ++kx) use(which, c, ky, kx);
  }
  std::int64_t first_tap(std::int64_t which) const { return maximum(0, -other_[which].dx); }
  std::int64_t last_tap(std::int64_t which) const { return s_.kernel[1] - maximum(0, other_[which].dx); }

  void centre(const R* painted, std::int64_t first, std::int64_t last) {
    for (std::int64_t c = 0; c < g_.in; ++c) {
      const Vector<R> shift = splat<R>(shift_[c]);
      for (std::int64_t i = first; i < last; i += width<R>) {
        const std::int64_t at = c * canvas_.plane() + minimum(i, canvas_.plane() - width<R>);
        store(centred_ + at, load(painted + at) - shift);
      }
    }
  }

  // Where taps' windows begin and end, in order.
  void find_edges(std::int64_t begin, std::int64_t end, std::int64_t* edge) const {
    const std::int64_t step = s_.dilation[0], taps = s_.kernel[0];
    for (std::int64_t starts = 0, ends = 0; ends < taps;) {
      const bool start = starts < taps && begin + starts * step <= end + ends * step;
      *edge++ = start ? begin + starts++ * step : end + ends++ * step;
    }
  }

  void add_band(std::int64_t first, std::int64_t last, R* products) {
    const std::int64_t reach = (s_.kernel[1] - 1) * s_.dilation[1], columns = g_.w + reach;
    const std::int64_t rows = maximum(1, patch_terms / ceil_divide(columns, width<R>));
    for (std::int64_t y = first; y < last; y += rows)
      for (std::int64_t x = 0, vectors; x < columns; x += vectors * width<R>) {
        vectors = x < reach ? 0 : (g_.w - x) / width<R>;  // in the windows of all taps
        const bool inside = vectors > 0;
        vectors = maximum(1, vectors);
        for (std::int64_t c = 0; c < g_.in; c += most_channels)
          add_channels(minimum(most_channels, g_.in - c), c, y, minimum(rows, last - y), x, vectors, inside, products);
      }
  }

  template <int channels = 1, class... Arguments>
  void add_channels(std::int64_t n, Arguments... arguments) {
    if constexpr (channels < most_channels) {
      if (n > channels) return add_channels<channels + 1>(n, arguments...);
    }
    add_products<channels>(arguments...);
  }

  // The products of channels from c, of some rows from y, of vectors of columns from x.
  template <int channels>
  void add_products(std::int64_t c, std::int64_t y, std::int64_t rows, std::int64_t x, std::int64_t vectors,
                    bool inside, R* products) {
    typedef Vector<R> V;
    constexpr int others = others_beside<channels>;
    const R* const from = centred_ + c * canvas_.plane() + y * canvas_.row() + x;
    const Mask<R> column = lanes_from<R>(x);
    for (std::int64_t which = 0; which < others_; which += others) {
      alignas(64) R sums[channels * others * width<R>];
      const R* place[others];
      for (int j = 0; j < others; ++j) place[j] = centred_ + other_[which + j].at + y * canvas_.row() + x;
      multiply_places<R, channels, others>(from, canvas_.plane(), place, rows, canvas_.row(), vectors, sums);
      for (int j = 0; j < others; ++j)
        for (std::int64_t kx = first_tap(which + j); kx < last_tap(which + j); ++kx) {
          const int begin = static_cast<int>(kx * s_.dilation[1]), end = static_cast<int>(begin + g_.w);
          const Mask<R> looks = (column >= splat_mask<R>(begin)) & (column < splat_mask<R>(end));
          R* const to = products + product(which + j, kx, c);
          for (int i = 0; i < channels; ++i) {
            const V sum = load(sums + (i * others + j) * width<R>);
            store(to + i * width<R>, load(to + i * width<R>) + (inside ? sum : select<R>(looks, sum, V{})));
          }
        }
    }
  }

  const Canvas canvas_;
  const Shape& s_;
  const Geometry<R>& g_;
  std::int64_t parts_, rows_, reach_, others_, pairs_;
  Other* other_;
  double* sums_;
  R *shift_, *products_, *centred_;
};

}  // namespace
}  // namespace fastmeta::conv_block
