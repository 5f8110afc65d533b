// Winograd transforms of whole tensors: images to tiles and back, packed weights to points and back.
//
// Tiles of images [block of channels][tile][channel] and products [tile][channels] lie one point after another, a
// vector further apart than their size: a power of two would put all points of a tile into one set of the cache.
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

struct Corner {
  std::int64_t image, y, x;  // of a tile's outputs
};

inline Corner corner(const Grid& g, std::int64_t tile) {
  const std::int64_t image = tile / (g.down * g.across), rest = tile % (g.down * g.across);
  return {image, rest / g.across * g.side, rest % g.across * g.side};
}

// The pixels of a square of an image, some of which may lie outside.
template <int side, class R>
class Square {
 public:
  FASTMETA_INLINE Square(R* image, std::int64_t height, std::int64_t width_, std::int64_t channels, std::int64_t y,
                         std::int64_t x)
      : whole_(y >= 0 && x >= 0 && y + side <= height && x + side <= width_),
        first_(image + (y * width_ + x) * channels),
        row_(width_ * channels),
        channels_(channels) {
    if (whole_) return;
    for (int i = 0; i < side; ++i)
      for (int j = 0; j < side; ++j) {
        const bool inside = y + i >= 0 && y + i < height && x + j >= 0 && x + j < width_;
        pixel_[i * side + j] = inside ? first_ + i * row_ + j * channels : nullptr;
      }
  }

  // use(pixel), where pixel(k) is the address of pixel k, null outside; without a test where all lie inside.
  template <class Use>
  FASTMETA_INLINE void apply(Use use) const {
    if (whole_) {
      use([this](int k) { return first_ + k / side * row_ + k % side * channels_; });
    } else {
      use([this](int k) { return pixel_[k]; });
    }
  }

 private:
  bool whole_;
  R* first_;
  std::int64_t row_, channels_;
  R* pixel_[side * side];
};

template <class R>
FASTMETA_INLINE Vector<R> load_pixel(const R* pixel, std::int64_t channel) {
  return pixel == nullptr ? Vector<R>{} : load(pixel + channel);
}

// What the next tiles will read, asked for a little at a time while products leave the memory idle.
template <class R>
struct Ahead {
  const R* first = nullptr;
  std::int64_t lines = 0;

  static constexpr std::int64_t line = 64 / sizeof(R);

  Ahead() = default;
  // `count` tiles from `tile`, which may go on into images behind those of the grid, up to `images`.
  Ahead(const Grid& g, const R* x, std::int64_t channels, std::int64_t tile, std::int64_t count, std::int64_t images) {
    const std::int64_t end = minimum(tile + count, images * g.down * g.across);
    if (end <= tile) return;
    const Corner a = corner(g, tile), b = corner(g, end - 1);
    const std::int64_t from = a.image * g.height + maximum(0, a.y - g.pad[0]);
    const std::int64_t to = b.image * g.height + minimum(g.height, b.y - g.pad[0] + g.side + 2);
    first = x + from * g.width * channels;
    lines = (to - from) * g.width * channels / line;
  }

  FASTMETA_INLINE void ask(int part, int parts) const {
    for (std::int64_t i = lines * part / parts; i < lines * (part + 1) / parts; ++i)
      FASTMETA_PREFETCH_READ(first + i * line);
  }
};

// Of a block of tiles that begins at `first`, those from `begin` to `end`.
struct Some {
  std::int64_t first, begin, end;
};

// tiles[point] = B^T x B.
template <class T, class R>
void transform_input(const Grid& g, const R* x, std::int64_t channels, Some some, R* tiles, std::int64_t room) {
  const std::int64_t point = point_size<R>(room * channels);
  for (std::int64_t t = some.begin; t < some.end; ++t) {
    const Corner at = corner(g, some.first + t);
    const Square<T::points, const R> square(x + at.image * g.height * g.width * channels, g.height, g.width, channels,
                                            at.y - g.pad[0], at.x - g.pad[1]);
    square.apply([&](auto pixel) {
      for (std::int64_t c = 0; c < channels; c += width<R>) {
        R* to = tiles + c * room + t * width<R>;
        both_axes<T::points, T::points, Vector<R>>([&](int k) { return load_pixel(pixel(k), c); }, T::input,
                                                   [&](int k, Vector<R> v) { store(to + k * point, v); });
      }
    });
  }
}

// tiles[point] = A d A^T, of cotangents d of the result.
template <class T, class R>
void transform_gradient(const Grid& g, const R* d, std::int64_t channels, Some some, R* tiles, std::int64_t room) {
  const std::int64_t point = point_size<R>(room * channels);
  for (std::int64_t t = some.begin; t < some.end; ++t) {
    const Corner at = corner(g, some.first + t);
    const Square<T::side, const R> square(d + at.image * g.h * g.w * channels, g.h, g.w, channels, at.y, at.x);
    square.apply([&](auto pixel) {
      for (std::int64_t c = 0; c < channels; c += width<R>) {
        R* to = tiles + c * room + t * width<R>;
        both_axes<T::side, T::points, Vector<R>>([&](int k) { return load_pixel(pixel(k), c); }, T::output_transposed,
                                                 [&](int k, Vector<R> v) { store(to + k * point, v); });
      }
    });
  }
}

// y = A^T products A.
template <class T, class R>
void finish_output(const Grid& g, const R* products, std::int64_t channels, Some some, R* y, std::int64_t room) {
  const std::int64_t point = point_size<R>(room * channels);
  for (std::int64_t t = some.begin; t < some.end; ++t) {
    const Corner at = corner(g, some.first + t);
    const Square<T::side, R> square(y + at.image * g.h * g.w * channels, g.h, g.w, channels, at.y, at.x);
    square.apply([&](auto pixel) {
      for (std::int64_t c = 0; c < channels; c += width<R>) {
        const R* from = products + t * channels + c;
        Vector<R> out[T::side * T::side];
        both_axes<T::points, T::side, Vector<R>>([&](int k) { return load(from + k * point); }, T::output,
                                                 [&](int k, Vector<R> v) { out[k] = v; });
#pragma GCC unroll 16
        for (int k = 0; k < T::side * T::side; ++k) {
          R* to = pixel(k);
          if (to != nullptr) store(to + c, out[k]);
        }
      }
    });
  }
}

// d_x += B products B^T of the channels from `begin` to `end`: tiles of the input overlap.
template <class T, class R>
void finish_gradient(const Grid& g, const R* products, std::int64_t channels, std::int64_t begin, std::int64_t end,
                     Some some, R* dx, std::int64_t room) {
  const std::int64_t point = point_size<R>(room * channels);
  for (std::int64_t t = some.begin; t < some.end; ++t) {
    const Corner at = corner(g, some.first + t);
    const Square<T::points, R> square(dx + at.image * g.height * g.width * channels, g.height, g.width, channels,
                                      at.y - g.pad[0], at.x - g.pad[1]);
    square.apply([&](auto pixel) {
      for (std::int64_t c = begin; c < end; c += width<R>) {
        const R* from = products + t * channels + c;
        both_axes<T::points, T::points, Vector<R>>([&](int k) { return load(from + k * point); }, T::input_transposed,
                                                   [&](int k, Vector<R> v) {
                                                     R* to = pixel(k);
                                                     if (to != nullptr) store(to + c, load(to + c) + v);
                                                   });
      }
    });
  }
}

constexpr int taps3x3 = 9;

// points[point][channel of the input][channel of its slice's result] = G w G^T, of input channel i.
template <class T, class R>
void transform_weight(const Geometry<R>& g, const R* w, std::int64_t i, R* points) {
  const std::int64_t point = point_size<R>(g.weight() / taps3x3);
  const R* from = w + (i / width<R> * taps3x3 * width<R> + i % width<R>) * g.slice_out;
  for (std::int64_t o = 0; o < g.slice_out; o += width<R>) {
    R* to = points + i * g.slice_out + o;
    both_axes<3, T::points, Vector<R>>([&](int t) { return load(from + t * width<R> * g.slice_out + o); }, T::weight,
                                       [&](int k, Vector<R> v) { store(to + k * point, v); });
  }
}

// points[point][channel of the result][channel of its slice's input], of the vectors from input channel i and result o.
template <class T, class R>
void transform_weight_transposed(const Geometry<R>& g, const R* w, std::int64_t i, std::int64_t o, R* points) {
  const std::int64_t point = point_size<R>(g.weight() / taps3x3), slice = i / g.slice_in;
  if (o / g.slice_out != slice) return;
  alignas(64) R turned[taps3x3 * width<R> * width<R>];
  for (int t = 0; t < taps3x3; ++t)
    transpose_square(w + (i * taps3x3 + t * width<R>) * g.slice_out + o - slice * g.slice_out, g.slice_out,
                     turned + t * width<R> * width<R>, width<R>);
  for (int k = 0; k < width<R>; ++k) {
    R* to = points + (o + k) * g.slice_in + i - slice * g.slice_in;
    both_axes<3, T::points, Vector<R>>([&](int t) { return load(turned + (t * width<R> + k) * width<R>); }, T::weight,
                                       [&](int p, Vector<R> v) { store(to + p * point, v); });
  }
}

// d_w = G^T points G, of the input channels from `first` to `last`.
template <class T, class R>
void finish_weight(const Geometry<R>& g, const R* points, std::int64_t first, std::int64_t last, R* dw) {
  const std::int64_t point = point_size<R>(g.weight() / taps3x3);
  for (std::int64_t i = first; i < last; ++i) {
    R* to = dw + (i / width<R> * taps3x3 * width<R> + i % width<R>) * g.slice_out;
    for (std::int64_t o = 0; o < g.out_of(i / g.slice_in); o += width<R>) {
      const R* from = points + i * g.slice_out + o;
      both_axes<T::points, 3, Vector<R>>([&](int k) { return load(from + k * point); }, T::weight_transposed,
                                         [&](int t, Vector<R> v) { store(to + t * width<R> * g.slice_out + o, v); });
    }
  }
}

}  // namespace
}  // namespace fastmeta::conv_block
