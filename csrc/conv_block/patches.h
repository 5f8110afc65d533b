// Mean and covariance of the patches of a task's data that a convolution's weight meets.
//
// The convolution's result is linear in them, so they give its batch statistics, and those of any tangent, without a
// look at the result: mean z = w^T mean P, var z = w^T cov P w.
#pragma once

#include "canvas.h"

namespace fastmeta::conv_block {
namespace {

constexpr int patch_tile = vector_registers == 32 ? 4 : 3;           // rows of a weight taken against as many others
constexpr int patch_sums = patch_tile * patch_tile + patch_tile;     // products, and the sums of the first ones
constexpr std::int64_t patch_terms = 48;  // of a running sum before it goes on in double precision

template <class R>
class Patches {
 public:
  Patches(const Canvas& c, const Geometry<R>& g, std::int64_t parts, Arena<R>& common, Arena<R>& own)
      : canvas_(c), g_(g), rows_(g.panels()), blocks_(ceil_divide(rows_, patch_tile)), parts_(parts),
        size_(blocks_ * (blocks_ + 1) / 2 * patch_sums * width<R>),
        sums_(common.template take_as<double>(parts * size_)), centred_(own.take(c.size() + width<R>)),
        shift_(common.template take_as<double>(g.in)) {}

  void prepare_own() { fill_zero(centred_ + canvas_.size(), width<R>); }

  // Patches are shifted by the mean of a typical image, so that little cancels when the mean is taken off.
  void centre_on(const R* image) {
    const std::int64_t pixels = g_.height * g_.width;
    for (std::int64_t c = 0; c < g_.in; ++c) {
      double total = 0;
      for (std::int64_t i = 0; i < pixels; ++i) total += static_cast<double>(image[c * pixels + i]);
      shift_[c] = static_cast<R>(total / static_cast<double>(pixels));
    }
  }

  void start(std::int64_t part) { fill_zero(sums_ + part * size_, size_); }

  // The result's rows from `begin` to `end` of an image on the canvas, whose planes are no smaller than a vector.
  void include(std::int64_t part, const R* painted, const std::int64_t* offset, std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin * canvas_.row(), last = canvas_.plane() - (g_.h - end) * canvas_.row();
    for (std::int64_t c = 0; c < g_.in; ++c) {
      const Vector<R> shift = splat<R>(static_cast<R>(shift_[c]));
      for (std::int64_t i = first; i < last; i += width<R>) {
        const std::int64_t at = c * canvas_.plane() + minimum(i, canvas_.plane() - width<R>);
        store(centred_ + at, load(painted + at) - shift);
      }
    }
    const std::int64_t chunk = maximum(1, patch_terms / ceil_divide(g_.w, width<R>));
    for (std::int64_t y = begin; y < end; y += chunk) {
      double* sums = sums_ + part * size_;
      for (std::int64_t i = 0; i < blocks_; ++i)
        for (std::int64_t j = i; j < blocks_; ++j, sums += patch_sums * width<R>) {
          if (i == j) {
            include_rows<true>(offset, i * patch_tile, j * patch_tile, y, minimum(end, y + chunk), sums);
          } else {
            include_rows<false>(offset, i * patch_tile, j * patch_tile, y, minimum(end, y + chunk), sums);
          }
        }
    }
  }

  // mean [rows], covariance [rows, rows]
  void finish(double* mean, double* covariance) const {
    for (std::int64_t part = 1; part < parts_; ++part)
      for (std::int64_t i = 0; i < size_; ++i) sums_[i] += sums_[part * size_ + i];
    const double share = 1 / static_cast<double>(g_.count());
    const double* sums = sums_;
    for (std::int64_t i = 0; i < blocks_; ++i)  // blocks (i, i), which come first, hold the means
      for (std::int64_t j = i; j < blocks_; ++j, sums += patch_sums * width<R>)
        for (int a = 0; a < patch_tile; ++a) {
          const std::int64_t row = i * patch_tile + a;
          if (row >= rows_) continue;
          if (i == j) mean[row] = total(sums, patch_tile * patch_tile + a) * share;
          for (int b = 0; b < patch_tile; ++b) {
            const std::int64_t column = j * patch_tile + b;
            if (column >= rows_) continue;
            const double value = total(sums, a * patch_tile + b) * share;
            covariance[row * rows_ + column] = covariance[column * rows_ + row] = value;
          }
        }
    for (std::int64_t a = 0; a < rows_; ++a)
      for (std::int64_t b = 0; b < rows_; ++b) covariance[a * rows_ + b] -= mean[a] * mean[b];
    for (std::int64_t a = 0; a < rows_; ++a) mean[a] += shift_[a / g_.taps];
  }

 private:
  static double total(const double* sums, int which) {
    double sum = 0;
    for (int i = 0; i < width<R>; ++i) sum += sums[which * width<R> + i];
    return sum;
  }

  // Output rows from y to last, weight rows from i against those from j; rows past the end repeat the last.
  template <bool diagonal>
  void include_rows(const std::int64_t* offset, std::int64_t i, std::int64_t j, std::int64_t y, std::int64_t last,
                    double* sums) {
    typedef Vector<R> V;
    V products[patch_tile][patch_tile] = {}, plain[patch_tile] = {};
    const R *left[patch_tile], *right[patch_tile];
    for (int a = 0; a < patch_tile; ++a) {
      left[a] = centred_ + offset[minimum(i + a, rows_ - 1)];
      right[a] = centred_ + offset[minimum(j + a, rows_ - 1)];
    }
    const Mask<R> lane = lanes_from<R>(0);
    for (; y < last; ++y) {
      std::int64_t x = y * canvas_.row();
      for (std::int64_t rest = g_.w; rest > 0; rest -= width<R>, x += width<R>) {
        // Also where the mask is full: what it has been applied to stays in a register, a bare load would be repeated.
        const Mask<R> inside = lane < splat_mask<R>(static_cast<int>(minimum(rest, width<R>)));
        V l[patch_tile], r[patch_tile];
#pragma GCC unroll 4
        for (int a = 0; a < patch_tile; ++a) {
          l[a] = select<R>(inside, load(left[a] + x), V{});
          r[a] = select<R>(inside, load(right[a] + x), V{});
        }
#pragma GCC unroll 4
        for (int a = 0; a < patch_tile; ++a) {
          if constexpr (diagonal) plain[a] += l[a];
#pragma GCC unroll 4
          for (int b = 0; b < patch_tile; ++b) products[a][b] += l[a] * r[b];
        }
      }
    }
    for (int a = 0; a < patch_tile; ++a) {
      if constexpr (diagonal) accumulate<R>(sums + (patch_tile * patch_tile + a) * width<R>, plain[a]);
      for (int b = 0; b < patch_tile; ++b) accumulate<R>(sums + (a * patch_tile + b) * width<R>, products[a][b]);
    }
  }

  const Canvas canvas_;
  const Geometry<R>& g_;
  std::int64_t rows_, blocks_, parts_, size_;
  double* sums_;
  R* centred_;
  double* shift_;
};

}  // namespace
}  // namespace fastmeta::conv_block
