// Sizes that follow from a shape, and the bump allocator that cuts buffers into pieces.
#pragma once

#include "../common/pool.h"
#include "kernels.h"

namespace fastmeta::conv_block {
namespace {

// Channels on one side of a convolution, padded: of all slices, of each one, of the k-th.
struct Sides {
  std::int64_t all, slices, each;
  std::int64_t of(std::int64_t k) const { return minimum(each, all - k * each); }
};

// Input channels come in panels: a whole vector of them where the input is an image between operations, one channel
// where it is a task's data. Rows of a packed weight are ordered by (block of channels, tap, channel within the block).
//
// A convolution of several groups is cut into slices of neighbouring groups, each with whole panels of input and whole
// vectors of output channels: a small dense convolution, the last one perhaps smaller, with a packed weight of its own.
// Support and query share packed weights, so this depends on nothing but the weight.
template <class R>
struct Geometry : PooledImage {                    // the convolution's result
  std::int64_t n, in, out, groups, height, width;  // of the input
  std::int64_t depth;                              // channels of a panel
  std::int64_t ci;                                 // channels, padded (data are not)
  std::int64_t blocks;                             // ci / depth
  std::int64_t taps;
  std::int64_t slices = 1, slice_in, slice_out;    // channels of a slice

  explicit Geometry(const Shape& s)
      : PooledImage(s.pool, extent(s, 0), extent(s, 1), padded<R>(s.out)),
        n(s.n),
        in(s.in),
        out(s.out),
        groups(s.groups),
        height(s.height),
        width(s.width),
        depth(s.data ? 1 : fastmeta::width<R>),
        ci(s.data ? in : padded<R>(in)),
        blocks(ci / depth),
        taps(s.kernel[0] * s.kernel[1]),
        slice_in(ci),
        slice_out(co) {
    const std::int64_t group_in = in / groups, group_out = out / groups;
    std::int64_t together = 1;
    while (together < groups && (together * group_in % depth != 0 || together * group_out % fastmeta::width<R> != 0))
      ++together;
    if (together == groups) return;
    slices = ceil_divide(groups, together);
    slice_in = together * group_in;
    slice_out = together * group_out;
  }

  // Of the result along an axis.
  static std::int64_t extent(const Shape& s, int axis) {
    const std::int64_t window = s.dilation[axis] * (s.kernel[axis] - 1) + 1;
    return places(axis == 0 ? s.height : s.width, window, s.stride[axis], s.padding[axis]);
  }

  std::int64_t panels() const { return blocks * taps; }
  std::int64_t slice_panels() const { return slice_in / depth * taps; }
  std::int64_t slice_weight() const { return slice_in * taps * slice_out; }
  std::int64_t weight() const { return slices * slice_weight(); }
  Sides inputs() const { return {ci, slices, slice_in}; }
  Sides outputs() const { return {co, slices, slice_out}; }
  std::int64_t in_of(std::int64_t k) const { return inputs().of(k); }
  std::int64_t out_of(std::int64_t k) const { return outputs().of(k); }
  std::int64_t image() const { return height * width * ci; }  // of the input, in the layout between operations
  std::int64_t count() const { return n * h * w; }  // values a channel is normalised over
};

// Without memory it only counts.
template <class R>
struct Arena {
  R* base;
  std::int64_t used = 0;

  explicit Arena(R* memory) : base(memory) {}

  R* take(std::int64_t n) {
    constexpr std::int64_t line = 64 / sizeof(R);
    R* p = base == nullptr ? nullptr : base + used;
    used += ceil_divide(n, line) * line;
    return p;
  }
  template <class T>
  T* take_as(std::int64_t n) {
    return reinterpret_cast<T*>(take(ceil_divide(n * static_cast<std::int64_t>(sizeof(T)), sizeof(R))));
  }
};

// Scratch of a map: what its threads share, and behind that what each has to itself. A `Scratch` is made of two arenas
// and only finds places, so that every thread may make its own as often as it likes.
template <class R>
struct Room {
  R* memory;
  std::int64_t common, own;
  int threads;

  template <class Scratch, class... Arguments>
  static Room of(R* memory, int threads, const Arguments&... arguments) {
    Arena<R> common(nullptr), own(nullptr);
    Scratch(arguments..., common, own);
    return {memory, common.used, own.used, static_cast<int>(maximum(1, threads))};
  }
  template <class Scratch, class... Arguments>
  Scratch at(int seat, const Arguments&... arguments) const {
    Arena<R> shared(memory), mine(memory + common + seat * own);
    return Scratch(arguments..., shared, mine);
  }
};

// A sum over all images is made of so many sums of parts, whoever computes them: its bits do not depend on the threads.
constexpr std::int64_t most_parts = 16;

}  // namespace
}  // namespace fastmeta::conv_block
