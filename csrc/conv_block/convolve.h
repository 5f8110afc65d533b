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
    for (std::int64_t k = 0; k < g_.slices; ++k)
      multiply(Product<R>{painted_, canvas_.size(), s_.stride[0] * canvas_.row(), offset_ + k * g_.slice_panels(),
                          g_.in_of(k) / g_.depth * g_.taps, w + k * g_.slice_weight(), g_.slice_out,
                          z + k * g_.slice_out, g_.result(), g_.w * g_.co, g_.co, count, g_.h, g_.w, g_.out_of(k), add},
               g_.depth);
  }

  // d_w (+)= painted images^T dz.
  void weight_gradient(const R* dz, std::int64_t count, R* dw, bool add, int threads) {
    const auto outer = [&](std::int64_t slice) {
      return Outer<R>{{}, canvas_.size(), s_.stride[0] * canvas_.row(), g_.depth, dz + slice * g_.slice_out,
                      g_.result(), g_.w * g_.co, g_.co, width<R>, count, g_.h, g_.w, nullptr, g_.slice_out, add};
    };
    if (s_.data) {
      for (std::int64_t k = 0; k < g_.slices; ++k)
        outer_scattered(outer(k), painted_, offset_ + k * g_.slice_panels(), g_.in_of(k) * g_.taps,
                        dw + k * g_.slice_weight(), g_.out_of(k));
      return;
    }
    parallel_for(g_.panels(), threads, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t p = begin; p < end; ++p) {
        const std::int64_t k = p / g_.slice_panels();
        outer_panel(outer(k), painted_ + offset_[p], dw + p * width<R> * g_.slice_out, g_.out_of(k));
      }
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
        offset_(common.template take_as<std::int64_t>(canvas_.blocks * g.taps)),
        painted_(own.take(group_ * canvas_.size())) {
    for (int i = 0; i < weights; ++i) turned_[i] = common.take(g.weight());
  }

  void prepare() { panel_offsets(canvas_, s_, true, offset_); }
  void prepare_own() { fill_zero(painted_, group_ * canvas_.size()); }

  // Of a slice turned[block of results][tap][result][channel of the input], those from input channel i and result o.
  void turn(const R* w, int which, std::int64_t i, std::int64_t o) {
    constexpr int v = width<R>;
    const std::int64_t slice = i / g_.slice_in;
    if (o / g_.slice_out != slice) return;
    i -= slice * g_.slice_in;
    o -= slice * g_.slice_out;
    const R* from = w + slice * g_.slice_weight();
    R* to = turned_[which] + slice * g_.slice_weight();
    for (std::int64_t t = 0; t < g_.taps; ++t)
      transpose_square(from + (i * g_.taps + t * v) * g_.slice_out + o, g_.slice_out,
                       to + (o * g_.taps + t * v) * g_.slice_in + i, g_.slice_in);
  }

  // d_x (+)= dz * w^T
  void apply(const R* dz, int which, std::int64_t count, R* dx, bool add, int threads) {
    for (std::int64_t first = 0; first < count; first += group_) {
      parallel_for(minimum(group_, count - first), threads, [&](std::int64_t begin, std::int64_t end, int) {
        R* const painted = painted_ + begin * canvas_.size();
        for (std::int64_t i = begin; i < end; ++i)
          paint(canvas_, dz + (first + i) * g_.result(), g_.h, g_.w, painted_ + i * canvas_.size());
        for (std::int64_t k = 0; k < g_.slices; ++k)
          multiply(Product<R>{painted, canvas_.size(), canvas_.row(),
                              offset_ + k * g_.slice_out / width<R> * g_.taps, g_.out_of(k) / width<R> * g_.taps,
                              turned_[which] + k * g_.slice_weight(), g_.slice_in,
                              dx + (first + begin) * g_.image() + k * g_.slice_in, g_.image(), g_.width * g_.ci, g_.ci,
                              end - begin, g_.height, g_.width, g_.in_of(k), add},
                   width<R>);
      });
    }
  }

 private:
  const Shape& s_;
  const Geometry<R>& g_;
  Canvas canvas_;
  std::int64_t group_;
  std::int64_t* offset_;
  R* painted_;
  R* turned_[2];
};

}  // namespace
}  // namespace fastmeta::conv_block
