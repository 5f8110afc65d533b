// g[k, :] (+)= sum over pixels of a[k][pixel] * z[pixel, :]
//
// The gradient of a convolution's weight: k counts rows of one panel, or of the whole weight where the input is data. A
// few rows times two vectors of outputs stay in registers while the pixels go by.
#pragma once

#include "../common/vectors.h"

namespace fastmeta::conv_block {
namespace {

constexpr int max_outer = vector_registers == 32 ? 9 : 5;  // rows that fit, with room for what they are made of

template <class R>
struct Outer {
  const R* a[max_outer];  // adjacent rows: the first alone is used, the others lie behind it
  std::int64_t a_image, a_row, a_pixel;
  const R* z;
  std::int64_t z_image, z_row, z_pixel, z_vector;
  std::int64_t images, height, width;
  R* g;
  std::int64_t g_row;
  bool add;
};

template <class R, int count, int vectors, bool adjacent>
void outer_product(const Outer<R>& o) {
  typedef Vector<R> V;
  V sums[count][vectors];
#pragma GCC unroll 16
  for (int k = 0; k < count; ++k)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) sums[k][j] = o.add ? load(o.g + k * o.g_row + j * width<R>) : V{};
  for (std::int64_t row = 0; row < o.images * o.height; ++row) {
    const std::int64_t image = row / o.height, y = row % o.height, first = image * o.a_image + y * o.a_row;
    const R* a[count];
#pragma GCC unroll 16
    for (int k = 0; k < count; ++k) a[k] = adjacent ? o.a[0] + first + k : o.a[k] + first;
    const R* z = o.z + image * o.z_image + y * o.z_row;
    std::int64_t at = 0;
#pragma GCC unroll 1
    for (std::int64_t x = 0; x < o.width; ++x, at += o.a_pixel, z += o.z_pixel) {
      V w[vectors];
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) w[j] = load(z + j * o.z_vector);
#pragma GCC unroll 16
      for (int k = 0; k < count; ++k) {
        const V v = splat<R>(adjacent ? a[0][at + k] : a[k][at]);
#pragma GCC unroll 2
        for (int j = 0; j < vectors; ++j) sums[k][j] += v * w[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < count; ++k)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) store(o.g + k * o.g_row + j * width<R>, sums[k][j]);
}

template <class R, int vectors, int count = 1>
void outer_of(std::int64_t n, const Outer<R>& o) {
  if constexpr (count <= max_outer) {
    if (n == count) {
      outer_product<R, count, vectors, false>(o);
    } else {
      outer_of<R, vectors, count + 1>(n, o);
    }
  }
}

// All outputs of `rows` scattered rows; a and g are set for each few of them.
template <class R>
void outer_scattered(Outer<R> o, const R* base, const std::int64_t* offset, std::int64_t rows, R* g,
                     std::int64_t channels) {
  const R* const z = o.z;
  std::int64_t first = 0;
  for (std::int64_t left = ceil_divide(rows, max_outer); left > 0; --left) {
    const std::int64_t count = ceil_divide(rows - first, left);
    for (std::int64_t k = 0; k < count; ++k) o.a[k] = base + offset[first + k];
    for (std::int64_t channel = 0; channel < channels; channel += 2 * width<R>) {
      o.z = z + channel / width<R> * o.z_vector;
      o.g = g + first * o.g_row + channel;
      if (channel + width<R> < channels) {
        outer_of<R, 2>(count, o);
      } else {
        outer_of<R, 1>(count, o);
      }
    }
    first += count;
  }
}

// All outputs of the rows of one panel, which lie side by side.
template <class R>
void outer_panel(Outer<R> o, const R* base, R* g, std::int64_t channels) {
  constexpr int part = vector_registers == 32 ? (width<R> < 8 ? width<R> : 8) : (width<R> < 4 ? width<R> : 4);
  const R* const z = o.z;
  for (std::int64_t channel = 0; channel < channels; channel += 2 * width<R>) {
    o.z = z + channel / width<R> * o.z_vector;
    for (int k = 0; k < width<R>; k += part) {
      o.a[0] = base + k;
      o.g = g + k * o.g_row + channel;
      if (channel + width<R> < channels) {
        outer_product<R, part, 2, true>(o);
      } else {
        outer_product<R, part, 1, true>(o);
      }
    }
  }
}

}  // namespace
}  // namespace fastmeta::conv_block
