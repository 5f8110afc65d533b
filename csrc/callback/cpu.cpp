#include <cstring>

#include "../common/simd.h"
#include "kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// What the maps keep for each other, the function keeps; an element of `saved` gives it a name.

namespace fastmeta::callback::FASTMETA_ISA {
namespace {

using executor::max_inputs;
using executor::max_weights;
using executor::Primal;
using executor::Sizes;
using executor::Tangent;

template <class R>
struct Layout {
  const Shape& s;

  explicit Layout(const void* shape) : s(*static_cast<const Shape*>(shape)) {}

  static Buffer buffer(const R* address, std::int64_t elements) {
    return {address, address == nullptr ? 0 : elements * static_cast<std::int64_t>(sizeof(R))};
  }

  Buffer result(const R* y) const { return buffer(y, s.rows * padded<R>(s.features)); }

  // Of inputs and weights, whatever derivative of theirs.
  template <class X, class W>
  Buffers operands(const Primal<R>& p, X* const* x, W* const* w) const {
    Buffers buffers{};
    buffers.key = p.saved;
    buffers.item = sizeof(R);
    for (int i = 0; i < max_inputs; ++i) {
      buffers.x[i] = buffer(x[i], s.x_rows[i] * padded<R>(s.x_features[i]));
      if (x[i] != nullptr && s.x_bytes[i] > 0) buffers.x[i].bytes = s.x_bytes[i];
    }
    for (int i = 0; i < max_weights; ++i) buffers.w[i] = buffer(w[i], padded<R>(s.weights[i]));
    return buffers;
  }
};

template <class R>
Sizes sizes(const void* shape) {
  const Layout<R> l(shape);
  Sizes sizes{};
  sizes.y = l.s.rows * padded<R>(l.s.features);
  sizes.saved = 1;
  for (int i = 0; i < max_weights; ++i) sizes.weights[i] = padded<R>(l.s.weights[i]);
  sizes.rereads_y = false;
  return sizes;
}

template <class R>
void pack(const void* shape, int which, const R* tensor, R* packed) {
  std::memcpy(packed, tensor, sizeof(R) * Layout<R>(shape).s.weights[which]);
}

template <class R>
void unpack(const void* shape, int which, const R* packed, R* tensor) {
  std::memcpy(tensor, packed, sizeof(R) * Layout<R>(shape).s.weights[which]);
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape);
  Buffers buffers = l.operands(p, p.x, p.w);
  buffers.y = l.result(p.y);
  l.s.call(Map::forward, buffers);
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape);
  Buffers buffers = l.operands(p, p.dx, p.dw);
  buffers.y = l.result(p.dy);
  l.s.call(Map::backward, buffers);
}

template <class R>
void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  const Layout<R> l(shape);
  Buffers buffers = l.operands(p, t.x_dot, t.w_dot);
  buffers.y = l.result(t.y_dot);
  l.s.call(Map::tangent, buffers);
}

template <class R>
void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  const Layout<R> l(shape);
  Buffers buffers = l.operands(p, t.dx_dot, t.dw_dot);
  buffers.y = l.result(p.dy);
  buffers.y_dot = l.result(t.dy_dot);
  l.s.call(Map::tangent_backward, buffers);
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,   sizes<R>,    pack<R>,    unpack<R>,
                                 forward<R>, backward<R>, tangent<R>, tangent_backward<R>};

}  // namespace

extern const Table table{maps<float>, maps<double>};

}  // namespace fastmeta::callback::FASTMETA_ISA
