// Winograd transforms of whole tensors: images to tiles and back, packed weights to points and back.
//
// Tiles of images [block of channels][tile][channel] and products [tile][channels] lie one point after another, a vector
// further apart than their size: a power of two would put all points of a tile into one set of the cache.
#pragma once

#include "../common/prefetch.h"
#include "geometry.h"
#include "winograd.h"

namespace fastmeta::conv_block {
namespace {

// Tiles over the convolution's result, and the images they come from.
struct Grid {
  std::int64_t images, height, width;  // of the input
  std::int64_t h, w;                   // of the result
  std::int64_t pad[2];
  std::int64_t side, down, across;  // tiles

  std::int64_t tiles() const { return images * down * across; }
};

template <class R>
Grid grid_of(const Shape& s, const Geometry<R>& g, std::int64_t images, std::int64_t side) {
  return {images, g.height,           g.width,          g.h, g.w, {s.padding[0], s.padding[1]},
          side,   ceil_divide(g.h, side), ceil_divide(g.w, side)};
}

template <class R>
constexpr std::int64_t point_size(std::int64_t elements) {
  return elements + width<R>;
}

constexpr std::int64_t tiles_ahead = 2;

struct Corner {
  std::int64_t image, y, x;  // of a tile's outputs
};

inline Corner corner(const Grid& g, std::int64_t tile) {
  const std::int64_t image = tile / (g.down * g.across), rest = tile % (g.down * g.across);
  return {image, rest / g.across * g.side, rest % g.across * g.side};
}

// The pixels of a square of an image. Those outside are met by one vector each of what stands in for them, whatever the
// channel, so that no branch is taken pixel by pixel.
template <int side, class R>
struct Square {
  static constexpr int all = side * side;
  bool whole;  // inside the image: pixels are found from the first
  R* first;
  std::int64_t row, channels;
  R* pixel[all];
  std::int64_t moves[all];  // all bits, or none outside

  FASTMETA_INLINE Square(R* image, std::int64_t height, std::int64_t width_, std::int64_t channels_, std::int64_t y,
                         std::int64_t x, R* outside, std::int64_t outside_step)
      : whole(y >= 0 && x >= 0 && y + side <= height && x + side <= width_),
        first(image + (y * width_ + x) * channels_),
        row(width_ * channels_),
        channels(channels_) {
    if (whole) return;
    for (int i = 0; i < side; ++i)
      for (int j = 0; j < side; ++j) {
        const bool inside = y + i >= 0 && y + i < height && x + j >= 0 && x + j < width_;
        const int k = i * side + j;
        pixel[k] = inside ? first + i * row + j * channels : outside + k * outside_step;
        moves[k] = inside ? -1 : 0;
      }
  }

  // visit(k, address of channel c of pixel k)
  template <class Visit>
  FASTMETA_INLINE void for_each(std::int64_t c, Visit visit) const {
    if (whole) {
#pragma GCC unroll 6
      for (int i = 0; i < side; ++i)
#pragma GCC unroll 6
        for (int j = 0; j < side; ++j) visit(i * side + j, first + i * row + j * channels + c);
    } else {
#pragma GCC unroll 36
      for (int k = 0; k < all; ++k) visit(k, pixel[k] + (c & moves[k]));
    }
  }

  template <class V>
  FASTMETA_INLINE void load_all(std::int64_t c, V* x) const {
    for_each(c, [=](int k, const R* p) { x[k] = load(p); });
  }
};

// Pixels of an image are met in the order of tiles, which no hardware foresees, so they are asked for some tiles ahead.
template <class R>
FASTMETA_INLINE void prefetch_tile(const Grid& g, const R* x, std::int64_t channels, std::int64_t tile) {
  if (tile >= g.tiles()) return;
  constexpr std::int64_t line = 64 / sizeof(R);
  const Corner at = corner(g, tile);
  const std::int64_t y = maximum(0, at.y - g.pad[0] + 2), x0 = maximum(0, at.x - g.pad[1] + 2);
  const std::int64_t last = minimum(g.height, at.y - g.pad[0] + g.side + 2), x1 = minimum(g.width, at.x - g.pad[1] + g.side + 2);
  for (std::int64_t i = y; i < last; ++i) {
    const R* row = x + ((at.image * g.height + i) * g.width + x0) * channels;
    for (std::int64_t k = 0; k < (x1 - x0) * channels; k += line) FASTMETA_PREFETCH_READ(row + k);
  }
}

// tiles[point] = B^T x B, of `count` tiles from `first`.
template <class T, class R>
void transform_input(const Grid& g, const R* x, std::int64_t channels, std::int64_t first, std::int64_t count, R* tiles,
                     std::int64_t room) {
  const R zeros[width<R>] = {};
  const std::int64_t point = point_size<R>(room * channels);
  for (std::int64_t t = 0; t < count; ++t) {
    const Corner at = corner(g, first + t);
    const Square<T::points, const R> square(x + at.image * g.height * g.width * channels, g.height, g.width, channels,
                                            at.y - g.pad[0], at.x - g.pad[1], zeros, 0);
    prefetch_tile(g, x, channels, first + t + tiles_ahead);
    for (std::int64_t c = 0; c < channels; c += width<R>) {
      Vector<R> in[T::all], out[T::all];
      square.load_all(c, in);
      both_axes<T::points, T::points>(in, out, T::input);
#pragma GCC unroll 36
      for (int i = 0; i < T::all; ++i) store(tiles + i * point + c * room + t * width<R>, out[i]);
    }
  }
}

// tiles[point] = A d A^T, of cotangents d of the result.
template <class T, class R>
void transform_gradient(const Grid& g, const R* d, std::int64_t channels, std::int64_t first, std::int64_t count, R* tiles,
                        std::int64_t room) {
  const R zeros[width<R>] = {};
  const std::int64_t point = point_size<R>(room * channels);
  for (std::int64_t t = 0; t < count; ++t) {
    const Corner at = corner(g, first + t);
    const Square<T::side, const R> square(d + at.image * g.h * g.w * channels, g.h, g.w, channels, at.y, at.x, zeros, 0);
    for (std::int64_t c = 0; c < channels; c += width<R>) {
      Vector<R> in[T::side * T::side], out[T::all];
      square.load_all(c, in);
      both_axes<T::side, T::points>(in, out, T::output_transposed);
#pragma GCC unroll 36
      for (int i = 0; i < T::all; ++i) store(tiles + i * point + c * room + t * width<R>, out[i]);
    }
  }
}

// y = A^T products A.
template <class T, class R>
void finish_output(const Grid& g, const R* products, std::int64_t channels, std::int64_t first, std::int64_t count, R* y,
                   std::int64_t room) {
  R nowhere[T::side * T::side * width<R>];
  const std::int64_t point = point_size<R>(room * channels);
  for (std::int64_t t = 0; t < count; ++t) {
    const Corner at = corner(g, first + t);
    const Square<T::side, R> square(y + at.image * g.h * g.w * channels, g.h, g.w, channels, at.y, at.x, nowhere, width<R>);
    for (std::int64_t c = 0; c < channels; c += width<R>) {
      Vector<R> in[T::all], out[T::side * T::side];
#pragma GCC unroll 36
      for (int i = 0; i < T::all; ++i) in[i] = load(products + i * point + t * channels + c);
      both_axes<T::points, T::side>(in, out, T::output);
      square.for_each(c, [&](int k, R* p) { store(p, out[k]); });
    }
  }
}

// d_x += B products B^T: tiles of the input overlap.
template <class T, class R>
void finish_gradient(const Grid& g, const R* products, std::int64_t channels, std::int64_t first, std::int64_t count, R* dx,
                     std::int64_t room) {
  R nowhere[T::all * width<R>] = {};
  const std::int64_t point = point_size<R>(room * channels);
  for (std::int64_t t = 0; t < count; ++t) {
    const Corner at = corner(g, first + t);
    const Square<T::points, R> square(dx + at.image * g.height * g.width * channels, g.height, g.width, channels,
                                      at.y - g.pad[0], at.x - g.pad[1], nowhere, width<R>);
    for (std::int64_t c = 0; c < channels; c += width<R>) {
      Vector<R> in[T::all], out[T::all];
#pragma GCC unroll 36
      for (int i = 0; i < T::all; ++i) in[i] = load(products + i * point + t * channels + c);
      both_axes<T::points, T::points>(in, out, T::input_transposed);
      square.for_each(c, [&](int k, R* p) { store(p, load(p) + out[k]); });
    }
  }
}

constexpr int taps3x3 = 9;

template <class T, class R>
FASTMETA_INLINE void store_points(const Vector<R>* w, R* points, std::int64_t point) {
  Vector<R> out[T::all];
  both_axes<3, T::points>(w, out, T::weight);
#pragma GCC unroll 36
  for (int i = 0; i < T::all; ++i) store(points + i * point, out[i]);
}

// points[point][channel of the input][channel of the result] = G w G^T.
template <class T, class R>
void transform_weight(const Geometry<R>& g, const R* w, R* points) {
  const std::int64_t point = point_size<R>(g.ci * g.co);
  for (std::int64_t i = 0; i < g.ci; ++i) {
    const R* from = w + (i / width<R> * taps3x3 * width<R> + i % width<R>) * g.co;
    for (std::int64_t o = 0; o < g.co; o += width<R>) {
      Vector<R> in[taps3x3];
#pragma GCC unroll 9
      for (int t = 0; t < taps3x3; ++t) in[t] = load(from + t * width<R> * g.co + o);
      store_points<T, R>(in, points + i * g.co + o, point);
    }
  }
}

// points[point][channel of the result][channel of the input].
template <class T, class R>
void transform_weight_transposed(const Geometry<R>& g, const R* w, R* points) {
  const std::int64_t point = point_size<R>(g.ci * g.co);
  alignas(64) R turned[taps3x3 * width<R> * width<R>];
  for (std::int64_t i = 0; i < g.ci; i += width<R>)
    for (std::int64_t o = 0; o < g.co; o += width<R>) {
      for (int t = 0; t < taps3x3; ++t)
        transpose_square(w + (i * taps3x3 + t * width<R>) * g.co + o, g.co, turned + t * width<R> * width<R>, width<R>);
      for (int k = 0; k < width<R>; ++k) {
        Vector<R> in[taps3x3];
#pragma GCC unroll 9
        for (int t = 0; t < taps3x3; ++t) in[t] = load(turned + (t * width<R> + k) * width<R>);
        store_points<T, R>(in, points + (o + k) * g.ci + i, point);
      }
    }
}

// d_w = G^T points G.
template <class T, class R>
void finish_weight(const Geometry<R>& g, const R* points, R* dw) {
  const std::int64_t point = point_size<R>(g.ci * g.co);
  for (std::int64_t i = 0; i < g.ci; ++i) {
    R* to = dw + (i / width<R> * taps3x3 * width<R> + i % width<R>) * g.co;
    for (std::int64_t o = 0; o < g.co; o += width<R>) {
      Vector<R> in[T::all], out[taps3x3];
#pragma GCC unroll 36
      for (int k = 0; k < T::all; ++k) in[k] = load(points + k * point + i * g.co + o);
      both_axes<T::points, 3>(in, out, T::weight_transposed);
#pragma GCC unroll 9
      for (int t = 0; t < taps3x3; ++t) store(to + t * width<R> * g.co + o, out[t]);
    }
  }
}

}  // namespace
}  // namespace fastmeta::conv_block
