#include "../common/simd.h"
#include "kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// A permutation: tangents go the way of values, cotangents the way back, and nothing is saved.

namespace fastmeta::flatten::FASTMETA_ISA {
namespace {

using executor::Primal;
using executor::Sizes;
using executor::Tangent;

template <class R>
struct Layout {
  const Shape& s;
  std::int64_t image_row, row;

  explicit Layout(const void* shape)
      : s(*static_cast<const Shape*>(shape)), image_row(padded<R>(s.channels)), row(padded<R>(s.channels * s.pixels)) {}

  void to_rows(const R* images, R* rows) const {
    for (std::int64_t i = 0; i < s.n; ++i) {
      R* out = rows + i * row;
      const R* in = images + i * s.pixels * image_row;
      for (std::int64_t p = 0; p < s.pixels; ++p)
        for (std::int64_t c = 0; c < s.channels; ++c) out[c * s.pixels + p] = in[p * image_row + c];
      for (std::int64_t j = s.channels * s.pixels; j < row; ++j) out[j] = 0;
    }
  }

  void to_images(const R* rows, R* images) const {
    for (std::int64_t i = 0; i < s.n; ++i)
      for (std::int64_t p = 0; p < s.pixels; ++p) {
        const R* in = rows + i * row + p;
        R* out = images + (i * s.pixels + p) * image_row;
        for (std::int64_t c = 0; c < s.channels; ++c) out[c] = in[c * s.pixels];
        for (std::int64_t c = s.channels; c < image_row; ++c) out[c] = 0;
      }
  }
};

template <class R>
Sizes sizes(const void* shape) {
  const Layout<R> l(shape);
  Sizes sizes{};
  sizes.y = l.s.n * l.row;
  sizes.rereads_x = sizes.rereads_y = false;
  return sizes;
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R*) {
  Layout<R>(shape).to_rows(p.x[0], p.y);
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R*) {
  if (p.dx[0] != nullptr) Layout<R>(shape).to_images(p.dy, p.dx[0]);
}

template <class R>
void tangent(const void* shape, const Primal<R>&, const Tangent<R>& t, R*) {
  Layout<R>(shape).to_rows(t.x_dot[0], t.y_dot);
}

template <class R>
void tangent_backward(const void* shape, const Primal<R>&, const Tangent<R>& t, R*) {
  if (t.dx_dot[0] != nullptr) Layout<R>(shape).to_images(t.dy_dot, t.dx_dot[0]);
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,   sizes<R>,    nullptr,    nullptr,
                                 forward<R>, backward<R>, tangent<R>, tangent_backward<R>};

}  // namespace

extern const Table table{maps<float>, maps<double>};

}  // namespace fastmeta::flatten::FASTMETA_ISA
