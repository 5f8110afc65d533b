// Plans whose layers are known when a kernel is compiled, and walks over the layers of any plan.
//
// A kernel for any layers looks every one up, and what to do with it, each time that a warp comes by: which takes most of
// the instructions of a small network's meta-step. So common networks have kernels of their own.
#pragma once

#include <utility>

#include "plan.h"

namespace fastmeta::resident {

// The number of a layer that is known when a kernel is compiled.
template <int i>
struct Number {
  static constexpr int value = i;
  FASTMETA_HD constexpr operator int() const { return i; }
};

FASTMETA_HD constexpr int before(int i) { return i - 1; }
FASTMETA_HD constexpr int after(int i) { return i + 1; }
template <int i>
FASTMETA_HD constexpr Number<i - 1> before(Number<i>) {
  return {};
}
template <int i>
FASTMETA_HD constexpr Number<i + 1> after(Number<i>) {
  return {};
}

// Layers of these widths with biases and one activation between them, and a loss.
template <Activation activation, Loss given_loss, int... widths>
struct Shape {
  static constexpr int layers = static_cast<int>(sizeof...(widths)) - 1;
  static constexpr Loss loss = given_loss;
  static constexpr bool smooth = activation >= Activation::tanh;
  static_assert(activation == Activation::relu || activation == Activation::tanh || activation == Activation::sigmoid,
                "an activation whose result tells its derivatives");

  struct Table {
    Layer layer[layers];
    Sizes sizes;
  };

  FASTMETA_HD static constexpr Table table() {
    constexpr int width[] = {widths...};
    Table made{};
    for (int i = 0; i < layers; ++i) {
      Layer& l = made.layer[i];
      l.in = width[i], l.out = width[i + 1], l.bias = true, l.s = absent, l.c = absent;
      l.activation = i + 1 < layers ? activation : Activation::identity;
    }
    made.sizes = lay_out(made.layer, layers);
    return made;
  }
};

// A plan of such layers. Numbers of parameters and places of gradients are the plan's own.
template <class Shape>
struct Fixed : Plan {
  static constexpr bool fixed = true, smooth = Shape::smooth;
  static constexpr int layers = Shape::layers;
  static constexpr Loss loss = Shape::loss;
  static constexpr int packed = Shape::table().sizes.packed, tiles = Shape::table().sizes.tiles;

  explicit Fixed(const Plan& plan) : Plan(plan) {}

  template <int i>
  FASTMETA_HD static constexpr Layer at(Number<i>) {
    constexpr Layer found = Shape::table().layer[i];
    return found;
  }
  FASTMETA_HD static constexpr Layer first() { return at(Number<0>{}); }
  FASTMETA_HD static constexpr Layer last() { return at(Number<layers - 1>{}); }

  // Whether a plan has these layers.
  static bool fits(const Plan& plan) {
    if (plan.layers != layers || plan.loss != loss || plan.factored()) return false;
    constexpr auto table = Shape::table();
    for (int i = 0; i < layers; ++i) {
      const Layer &own = table.layer[i], &other = plan.layer[i];
      if (own.in != other.in || own.out != other.out || own.bias != other.bias || own.activation != other.activation)
        return false;
    }
    return true;
  }
};

template <class F, int... i>
FASTMETA_HD void each_of(F& f, std::integer_sequence<int, i...>) {
  (f(Number<i>{}), ...);
}

template <class F, int... i>
FASTMETA_HD void each_from(F& f, std::integer_sequence<int, i...>) {
  (f(Number<static_cast<int>(sizeof...(i)) - i>{}), ...);
}

// f(i) for every layer, from the first to the last.
template <class P, class F>
FASTMETA_HD void upward(const P& plan, F f) {
  if constexpr (P::fixed) {
    each_of(f, std::make_integer_sequence<int, P::layers>{});
  } else {
    for (int i = 0; i < plan.layers; ++i) f(i);
  }
}

// f(i) for every layer but the first, from the last.
template <class P, class F>
FASTMETA_HD void downward(const P& plan, F f) {
  if constexpr (P::fixed) {
    each_from(f, std::make_integer_sequence<int, P::layers - 1>{});
  } else {
    for (int i = plan.layers - 1; i > 0; --i) f(i);
  }
}

// f(j) for j from `begin` to `end`, a lane one of 32.
template <class P, class F>
FASTMETA_HD void over_lanes(int lane, int begin, int end, F f) {
  if constexpr (P::fixed) {
#pragma unroll
    for (int from = begin; from < end; from += warp_size)
      if (from + lane < end) f(from + lane);
  } else {
    for (int j = begin + lane; j < end; j += warp_size) f(j);
  }
}

}  // namespace fastmeta::resident
