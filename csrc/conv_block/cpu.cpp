#include "block.h"
#include "data_block.h"
#include "kernels.h"
#include "weights.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

namespace fastmeta::conv_block::FASTMETA_ISA {
namespace {

using executor::Maps;
using executor::Primal;
using executor::Sizes;
using executor::Tangent;

bool supported(const Shape& s) {
  if (s.groups < 1 || s.in % s.groups != 0 || s.out % s.groups != 0) return false;
  const Geometry<float> g(s);
  if (g.n < 1 || g.h < 1 || g.w < 1 || g.ph < 1 || g.pw < 1) return false;
  return can_pool(s.pool);
}

template <class R>
struct Block {
  static const Shape& of(const void* shape) { return *static_cast<const Shape*>(shape); }

  static Sizes sizes(const void* shape) {
    const Shape& s = of(shape);
    const Geometry<R> g(s);
    Sizes sizes = is_data_block(s, g) ? DataBlock<R>::sizes(s, g) : block_sizes(s, g);
    weight_sizes(s, g, sizes.weights);
    sizes.rereads_y = false;
    return sizes;
  }
  static void pack(const void* shape, int which, const R* tensor, R* packed) {
    const Geometry<R> g(of(shape));
    pack_weight(g, which, tensor, packed);
  }
  static void unpack(const void* shape, int which, const R* packed, R* tensor) {
    const Geometry<R> g(of(shape));
    unpack_weight(g, which, packed, tensor);
  }
  static void forward(const void* shape, const Primal<R>& p, R* scratch) {
    const Shape& s = of(shape);
    const Geometry<R> g(s);
    if (is_data_block(s, g)) {
      DataBlock<R>(s, g, p, scratch).forward();
    } else if (is_piecewise(s.activation)) {
      block_forward<R, Piecewise<R>>(s, g, p, scratch);
    } else {
      block_forward<R, Smooth<R>>(s, g, p, scratch);
    }
  }
  static void backward(const void* shape, const Primal<R>& p, R* scratch) {
    const Shape& s = of(shape);
    const Geometry<R> g(s);
    if (is_data_block(s, g)) {
      DataBlock<R>(s, g, p, scratch).backward();
    } else if (is_piecewise(s.activation)) {
      block_backward<R, Piecewise<R>>(s, g, p, scratch);
    } else {
      block_backward<R, Smooth<R>>(s, g, p, scratch);
    }
  }
  static void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
    const Shape& s = of(shape);
    const Geometry<R> g(s);
    if (is_data_block(s, g)) {
      DataBlock<R>(s, g, p, scratch).tangent(t);
    } else if (is_piecewise(s.activation)) {
      block_tangent<R, Piecewise<R>>(s, g, p, t, scratch);
    } else {
      block_tangent<R, Smooth<R>>(s, g, p, t, scratch);
    }
  }
  static void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
    const Shape& s = of(shape);
    const Geometry<R> g(s);
    if (is_data_block(s, g)) {
      DataBlock<R>(s, g, p, scratch).tangent_backward(t);
    } else if (is_piecewise(s.activation)) {
      block_tangent_backward<R, Piecewise<R>>(s, g, p, t, scratch);
    } else {
      block_tangent_backward<R, Smooth<R>>(s, g, p, t, scratch);
    }
  }

  static constexpr Maps<R> maps{fastmeta::width<R>, sizes, pack, unpack, forward, backward, tangent, tangent_backward};
};

}  // namespace

extern const Table table{supported, Block<float>::maps, Block<double>::maps};

}  // namespace fastmeta::conv_block::FASTMETA_ISA
