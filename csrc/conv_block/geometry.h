// Sizes that follow from a shape, and the bump allocator that cuts buffers into pieces.
#pragma once

#include "../common/vectors.h"
#include "kernels.h"

namespace fastmeta::conv_block {
namespace {

// Input channels come in panels: a whole vector of them where the input is an image between operations, one channel
// where it is a task's data. Rows of a packed weight are ordered by (block of channels, tap, channel within the block).
template <class R>
struct Geometry {
  std::int64_t n, in, out, groups, height, width;  // of the input
  std::int64_t depth;                      // channels of a panel
  std::int64_t ci, co;                     // channels, padded (ci: data are not)
  std::int64_t blocks;                     // ci / depth
  std::int64_t taps;
  std::int64_t h, w;    // of the convolution's result
  std::int64_t ph, pw;  // of the pooled result

  explicit Geometry(const Shape& s)
      : n(s.n),
        in(s.in),
        out(s.out),
        groups(s.groups),
        height(s.height),
        width(s.width),
        depth(s.data ? 1 : fastmeta::width<R>) {
    ci = s.data ? in : padded<R>(in);
    co = padded<R>(out);
    blocks = ci / depth;
    taps = s.kernel[0] * s.kernel[1];
    std::int64_t* const size[] = {&h, &w, &ph, &pw};
    for (int i = 0; i < 2; ++i) {
      const std::int64_t whole = i == 0 ? height : width;
      *size[i] = places(whole, s.dilation[i] * (s.kernel[i] - 1) + 1, s.stride[i], s.padding[i]);
      *size[2 + i] = *size[i];
      if (s.pool != Pool::none) *size[2 + i] = places(*size[i], s.pool_kernel[i], s.pool_stride[i], s.pool_padding[i]);
    }
  }

  // Of a window along an axis; none where it does not fit.
  static std::int64_t places(std::int64_t size, std::int64_t window, std::int64_t stride, std::int64_t padding) {
    const std::int64_t room = size + 2 * padding - window;
    return room < 0 ? 0 : room / stride + 1;
  }

  std::int64_t panels() const { return blocks * taps; }
  std::int64_t weight() const { return panels() * depth * co; }
  std::int64_t image() const { return height * width * ci; }  // of the input, in the layout between operations
  std::int64_t result() const { return h * w * co; }          // one image of the convolution's result
  std::int64_t pooled() const { return ph * pw * co; }
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
