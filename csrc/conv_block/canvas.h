// Images laid out for the direct products: bordered with zeros, channels in panels, columns split by stride.
//
// [block][row][phase][column][channel of the block]: pixels that neighbouring outputs read under the same tap lie one
// panel apart, whatever the stride, so that a kernel addresses them by constants.
#pragma once

#include "geometry.h"

namespace fastmeta::conv_block {
namespace {

struct Canvas {
  std::int64_t blocks, depth, rows, phases, columns;
  std::int64_t step[2], offset[2];  // pixel (y, x) of the image lies at row y * step[0] + offset[0], and so on

  std::int64_t row() const { return phases * columns * depth; }
  std::int64_t plane() const { return rows * row(); }
  std::int64_t size() const { return blocks * plane(); }
  std::int64_t at(std::int64_t y, std::int64_t x) const {
    return y * row() + (x % phases * columns + x / phases) * depth;
  }
};

template <class R>
Canvas canvas_of_input(const Shape& s, const Geometry<R>& g) {
  Canvas c{g.blocks, g.depth, 0, s.stride[1], 0, {1, 1}, {s.padding[0], s.padding[1]}};
  c.rows = (g.h - 1) * s.stride[0] + s.dilation[0] * (s.kernel[0] - 1) + 1;
  c.columns = ceil_divide((g.w - 1) * s.stride[1] + s.dilation[1] * (s.kernel[1] - 1) + 1, c.phases);
  return c;
}

// For the product with the transposed weight: strided gradients lie apart, with zeros between them.
template <class R>
Canvas canvas_of_gradient(const Shape& s, const Geometry<R>& g) {
  Canvas c{g.co / width<R>, width<R>, 0, 1, 0, {s.stride[0], s.stride[1]}, {0, 0}};
  for (int i = 0; i < 2; ++i) c.offset[i] = s.dilation[i] * (s.kernel[i] - 1) - s.padding[i];
  c.rows = g.height + s.dilation[0] * (s.kernel[0] - 1);
  c.columns = g.width + s.dilation[1] * (s.kernel[1] - 1);
  return c;
}

// Where each panel of the packed weight, or of its transpose, reads.
inline void panel_offsets(const Canvas& c, const Shape& s, bool transposed, std::int64_t* offset) {
  for (std::int64_t b = 0; b < c.blocks; ++b)
    for (std::int64_t y = 0; y < s.kernel[0]; ++y)
      for (std::int64_t x = 0; x < s.kernel[1]; ++x) {
        const std::int64_t ky = (transposed ? s.kernel[0] - 1 - y : y) * s.dilation[0];
        const std::int64_t kx = (transposed ? s.kernel[1] - 1 - x : x) * s.dilation[1];
        *offset++ = b * c.plane() + c.at(ky, kx);
      }
}

// Copies one image [height, width, blocks * depth] onto a canvas whose border is zero already.
template <class R>
void paint(const Canvas& c, const R* image, std::int64_t height, std::int64_t width_, R* canvas) {
  const std::int64_t channels = c.blocks * c.depth, limit = c.columns * c.phases;
  for (std::int64_t y = 0; y < height; ++y) {
    const std::int64_t row = y * c.step[0] + c.offset[0];
    if (row < 0 || row >= c.rows) continue;
    for (std::int64_t x = 0; x < width_; ++x) {
      const std::int64_t column = x * c.step[1] + c.offset[1];
      if (column < 0 || column >= limit) continue;
      const R* from = image + (y * width_ + x) * channels;
      R* to = canvas + c.at(row, column);
      for (std::int64_t b = 0; b < c.blocks; ++b) store(to + b * c.plane(), load(from + b * width<R>));
    }
  }
}

// The same for a task's image [channels, height, width], onto the canvas's rows from `begin` to `end`.
template <class R>
void paint_data(const Canvas& c, const R* image, std::int64_t height, std::int64_t width_, std::int64_t begin,
                std::int64_t end, R* canvas) {
  const std::int64_t limit = c.columns * c.phases;
  for (std::int64_t b = 0; b < c.blocks; ++b)
    for (std::int64_t y = maximum(0, begin - c.offset[0]); y < minimum(height, end - c.offset[0]); ++y) {
      const std::int64_t row = y + c.offset[0];
      const R* from = image + (b * height + y) * width_;
      R* to = canvas + b * c.plane();
      const std::int64_t first = maximum(0, -c.offset[1]), last = minimum(width_, limit - c.offset[1]);
      if (c.phases == 1) {
        if (last > first) {
          __builtin_memcpy(to + c.at(row, first + c.offset[1]), from + first,
                           static_cast<std::size_t>(last - first) * sizeof(R));
        }
      } else {
        for (std::int64_t x = first; x < last; ++x) to[c.at(row, x + c.offset[1])] = from[x];
      }
    }
}

}  // namespace
}  // namespace fastmeta::conv_block
