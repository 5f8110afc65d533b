// The products of a convolution computed directly, over groups of images: as many as stay in the second-level cache.
#pragma once

#include "../common/threads.h"
#include "canvas.h"
#include "outer.h"
#include "product.h"

namespace fastmeta::conv_block {
namespace {

constexpr std::int64_t group_bytes = 128 * 1024;  // of an image-sized tensor of a group

template <class R>
std::int64_t group_of(const Geometry<R>& g, std::int64_t image) {
  return minimum(g.n, maximum(1, group_bytes / (image * static_cast<std::int64_t>(sizeof(R)))));
}

// The product with the weight, and the gradient of it.
template <class R>
class Direct {
 public:
  Direct(const Shape& s, const Geometry<R>& g, Arena<R>& common, Arena<R>& own)
      : s_(s), g_(g), canvas_(canvas_of_input(s, g)), group_(group_of(g, canvas_.size())),
        offset_(common.template take_as<std::int64_t>(g.panels())), painted_(own.take(group_ * canvas_.size())) {}

  void prepare() { panel_offsets(canvas_, s_, false, offset_); }          // once for all threads
  void prepare_own() { fill_zero(painted_, group_ * canvas_.size()); }  // once for each

  std::int64_t group() const { return group_; }

  // Images from `first`, at most a group of them.
  void paint_group(const R* x, std::int64_t first, std::int64_t count, int threads) {
    parallel_for(count, threads, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        R* to = painted_ + i * canvas_.size();
        const R* from = x + (first + i) * g_.image();
        if (s_.data) {
          paint_data(canvas_, from, g_.height, g_.width, 0, canvas_.rows, to);
        } else {
          paint(canvas_, from, g_.height, g_.width, to);
        }
      }
    });
  }

  // z (+)= painted images * w.
  void apply(const R* w, std::int64_t count, R* z, bool add) {
    multiply(Product<R>{painted_, canvas_.size(), s_.stride[0] * canvas_.row(), offset_, g_.panels(), w, g_.co, z,
                        g_.result(), g_.w * g_.co, g_.co, count, g_.h, g_.w, g_.co, add},
             g_.depth);
  }

  // d_w (+)= painted images^T dz.
  void weight_gradient(const R* dz, std::int64_t count, R* dw, bool add, int threads) {
    const Outer<R> o{{}, canvas_.size(), s_.stride[0] * canvas_.row(), g_.depth, dz, g_.result(), g_.w * g_.co, g_.co,
                     width<R>, count, g_.h, g_.w, dw, g_.co, add};
    if (s_.data) {
      outer_scattered(o, painted_, offset_, g_.panels(), dw, g_.co);
      return;
    }
    parallel_for(g_.panels(), threads, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t p = begin; p < end; ++p)
        outer_panel(o, painted_ + offset_[p], dw + p * width<R> * g_.co, g_.co);
    });
  }

 private:
  const Shape& s_;
  const Geometry<R>& g_;
  Canvas canvas_;
  std::int64_t group_;
  std::int64_t* offset_;
  R* painted_;
};

// The product with transposed weights.
template <class R>
class DirectTransposed {
 public:
  DirectTransposed(const Shape& s, const Geometry<R>& g, int weights, Arena<R>& common, Arena<R>& own)
      : s_(s), g_(g), canvas_(canvas_of_gradient(s, g)), group_(group_of(g, canvas_.size())),
        panels_(canvas_.blocks * g.taps), offset_(common.template take_as<std::int64_t>(panels_)),
        painted_(own.take(group_ * canvas_.size())) {
    for (int i = 0; i < weights; ++i) turned_[i] = common.take(g.weight());
  }

  void prepare() { panel_offsets(canvas_, s_, true, offset_); }
  void prepare_own() { fill_zero(painted_, group_ * canvas_.size()); }

  // turned[block of results][tap][result][channel of the input], those from input channel i and result o.
  void turn(const R* w, int which, std::int64_t i, std::int64_t o) {
    constexpr int v = width<R>;
    for (std::int64_t t = 0; t < g_.taps; ++t)
      transpose_square(w + (i * g_.taps + t * v) * g_.co + o, g_.co,
                       turned_[which] + (o * g_.taps + t * v) * g_.ci + i, g_.ci);
  }

  // d_x (+)= dz * w^T
  void apply(const R* dz, int which, std::int64_t count, R* dx, bool add, int threads) {
    for (std::int64_t first = 0; first < count; first += group_) {
      parallel_for(minimum(group_, count - first), threads, [&](std::int64_t begin, std::int64_t end, int) {
        R* const painted = painted_ + begin * canvas_.size();
        for (std::int64_t i = begin; i < end; ++i)
          paint(canvas_, dz + (first + i) * g_.result(), g_.h, g_.w, painted_ + i * canvas_.size());
        multiply(Product<R>{painted, canvas_.size(), canvas_.row(), offset_, panels_, turned_[which], g_.ci,
                            dx + (first + begin) * g_.image(), g_.image(), g_.width * g_.ci, g_.ci, end - begin,
                            g_.height, g_.width, g_.ci, add},
                 width<R>);
      });
    }
  }

 private:
  const Shape& s_;
  const Geometry<R>& g_;
  Canvas canvas_;
  std::int64_t group_, panels_;
  std::int64_t* offset_;
  R* painted_;
  R* turned_[2];
};

}  // namespace
}  // namespace fastmeta::conv_block
