// c[pixel, :] (+)= sum over panels and their channels of a[pixel + offset[panel], channel] * b[panel, channel, :]
//
// A convolution where the panels are taps, a plain matrix product where they are blocks of channels. A tile of pixels
// times two vectors of outputs stays in registers; the pixels of a tile lie in up to four rows, so that small images
// fill it too.
#pragma once

#include "../common/vectors.h"

namespace fastmeta::conv_block {
namespace {

template <class R>
struct Product {
  const R* a;
  std::int64_t a_image, a_row;  // pixels of a row lie one panel's depth apart
  const std::int64_t* offset;
  std::int64_t panels;
  const R* b;
  std::int64_t b_row;
  R* c;
  std::int64_t c_image, c_row, c_pixel;
  std::int64_t images, height, width;
  std::int64_t channels;  // of c: whole vectors
  bool add;
  int terms = 144;  // of one running sum: rounding grows with its length
};

constexpr int max_rows = 4;
constexpr int tile_pixels = vector_registers == 32 ? 14 : 6;

template <class R>
struct Tile {
  const R* a[max_rows];
  R* c[max_rows];
  const std::int64_t* offset;
  std::int64_t panels;
  const R* b;
  std::int64_t b_row, c_pixel;
  bool add;
  int terms;
};

template <class R, int rows, int columns, int vectors, int depth>
void tile_product(const Tile<R>& t) {
  typedef Vector<R> V;
  const R* b = t.b;
  for (std::int64_t first = 0; first < t.panels; first += t.terms / depth) {
    const std::int64_t last = minimum(t.panels, first + t.terms / depth);
    V sums[rows][columns][vectors] = {};
    for (std::int64_t p = first; p < last; ++p) {
      const R* a[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) a[r] = t.a[r] + t.offset[p];
#pragma GCC unroll 1
      for (int k = 0; k < depth; ++k, b += t.b_row) {
        V w[vectors];
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) w[j] = load(b + j * width<R>);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
          for (int x = 0; x < columns; ++x) {
            const V v = splat<R>(a[r][x * depth + k]);
#pragma GCC unroll 2
            for (int j = 0; j < vectors; ++j) sums[r][x][j] += v * w[j];
          }
      }
    }
    const bool add = t.add || first > 0;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int x = 0; x < columns; ++x)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) {
          R* c = t.c[r] + x * t.c_pixel + j * width<R>;
          store(c, add ? load(c) + sums[r][x][j] : sums[r][x][j]);
        }
  }
}

template <class R, int rows, int vectors, int depth, int columns = 1>
void tile_of(std::int64_t n, const Tile<R>& t) {
  if constexpr (rows * columns <= tile_pixels) {
    if (n == columns) {
      tile_product<R, rows, columns, vectors, depth>(t);
    } else {
      tile_of<R, rows, vectors, depth, columns + 1>(n, t);
    }
  }
}

template <class R, int rows, int depth>
void rows_product(const Product<R>& p, std::int64_t first, std::int64_t channel) {
  Tile<R> t;
  t.offset = p.offset;
  t.panels = p.panels;
  t.b = p.b + channel;
  t.b_row = p.b_row;
  t.c_pixel = p.c_pixel;
  t.add = p.add;
  t.terms = p.terms;
  const bool pair = channel + width<R> < p.channels;
  std::int64_t x = 0;
  for (std::int64_t left = ceil_divide(p.width, tile_pixels / rows); left > 0; --left) {
    const std::int64_t columns = ceil_divide(p.width - x, left);
    for (int r = 0; r < rows; ++r) {
      const std::int64_t image = (first + r) / p.height, y = (first + r) % p.height;
      t.a[r] = p.a + image * p.a_image + y * p.a_row + x * depth;
      t.c[r] = p.c + image * p.c_image + y * p.c_row + x * p.c_pixel + channel;
    }
    if (pair) {
      tile_of<R, rows, 2, depth>(columns, t);
    } else {
      tile_of<R, rows, 1, depth>(columns, t);
    }
    x += columns;
  }
}

template <class R, int depth>
void multiply_panels(const Product<R>& p) {
  const std::int64_t rows = p.images * p.height;
  for (std::int64_t channel = 0; channel < p.channels; channel += 2 * width<R>) {
    std::int64_t row = 0;
    if constexpr (depth > 1) {
      if (4 * p.width <= tile_pixels)
        for (; row + 4 <= rows; row += 4) rows_product<R, 4, depth>(p, row, channel);
      if (2 * p.width <= tile_pixels)
        for (; row + 2 <= rows; row += 2) rows_product<R, 2, depth>(p, row, channel);
    }
    for (; row < rows; ++row) rows_product<R, 1, depth>(p, row, channel);
  }
}

template <class R>
void multiply(const Product<R>& p, std::int64_t depth) {
  if (depth == 1) {
    multiply_panels<R, 1>(p);
  } else {
    multiply_panels<R, width<R>>(p);
  }
}

}  // namespace
}  // namespace fastmeta::conv_block
