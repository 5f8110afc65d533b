// Where everything of one task lies in a block's shared memory, and how many threads a block has.
//
// A layer's weight and bias are one matrix: row `o` holds W[o, :] and then b[o]; the layer's input has a 1 there. So
// one product gives x W^T + b, and one product gives both gradients. Rows are whole quads of elements, an odd number of
// quads, so that neither eight lanes that read quads of eight rows, nor lanes that read along a row, meet in a bank;
// and there is a multiple of four rows, the last of zeros. All such matrices, one behind the other, are a packed vector.
//
// A pass is what the rows of one set leave: activations `a`, cotangents `d` by what the activation was applied to; slopes
// `s` and, for Hessian-vector products, curvatures `c`, where an activation's result does not tell them; and the loss's
// probabilities `p`. Its arrays are given by the elements one row has before them.
//
// A first layer may be factored: its weight moves by sums of the support set's rows alone, so W itself is never here. Its
// matrix has their coefficients instead, Ns columns for any width of the data; the layer reads rows of inner products with
// the support set, and adds `base`, the rows' product with the weight as it was. Only the first layer can be, for nothing
// below it wants a cotangent.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/host_device.h"
#include "network.h"

namespace fastmeta::resident {

constexpr int warp_size = 32;
constexpr int rows_at_once = 2;    // rows that a warp takes through the network together
constexpr int most_threads = 512;  // of a block: 128 registers each

struct Layer {
  int in, out;
  Activation activation;
  bool bias;
  double negative_slope;
  int parameter[2];            // numbers of weight and bias
  int quads, stride;           // of a row of the matrix: those in use, and elements from row to row
  int w;                       // its place in a packed vector
  int x, a, a_stride, d, d_stride;  // x: of what it reads, the layer before's a; absent for the data
  int s, c;                    // rows as far apart as those of d; absent where not needed
  int first_tile;              // tiles are 4 x 4 elements of the matrix
  std::int64_t gradient[2];    // place of the gradients of weight and bias in the flat result; absent: not wanted
};

struct Plan {
  Layer layer[most_layers];
  int layers;
  Loss loss;
  bool mean;
  std::int64_t ignored;
  int n[2], rows[2];  // of support and query set: rows, and rows in whole steps of rows_at_once
  int steps, adapted, rate_rows, rate_columns;
  bool gradient, second_order, learned;
  bool kept, spilled;  // passes are kept for the adjoint; in global memory, not in shared
  int packed, tiles, threads;
  int p;               // place of probabilities in a pass
  int pass;            // elements of one row in a pass
  // Places in shared memory, in elements.
  int x[2], target[2], base[2], rates, phi;  // base: absent unless factored
  int passes, query, u, row_loss, scale, partial;
  std::int64_t elements;
  std::int64_t gradient_elements;

  static constexpr bool fixed = false, factors = false;
  static constexpr int most_unrolled = 2;  // quads of a product in a row
  FASTMETA_HD const Layer& at(int i) const { return layer[i]; }
  FASTMETA_HD const Layer& first() const { return layer[0]; }
  FASTMETA_HD const Layer& last() const { return layer[layers - 1]; }

  bool factored() const { return base[0] != absent; }
  FASTMETA_HD int phi_at(int k) const { return phi + (kept && !spilled ? k * packed : 0); }
  // lam lies where phi_K was, which nothing reads when lam is written, unless phi_k come back there.
  FASTMETA_HD int lam() const { return spilled ? phi + packed : phi_at(steps); }
  FASTMETA_HD int pass_at(int k) const { return passes + (kept && !spilled ? k * rows[0] * pass : 0); }
  FASTMETA_HD std::int64_t tape() const { return packed + static_cast<std::int64_t>(rows[0]) * pass; }
};

// A plan whose first layer is factored, as kernels for it know.
struct Factored : Plan {
  static constexpr bool factors = true;

  explicit Factored(const Plan& plan) : Plan(plan) {}
};

FASTMETA_HD constexpr int whole(int count, int step) { return (count + step - 1) / step * step; }

// Elements from row to row for rows of `count`: an odd number of quads.
FASTMETA_HD constexpr int row_stride(int count) { return 4 * ((count + 3) / 4 | 1); }

inline bool keeps_slope(Activation f) {
  return f == Activation::leaky_relu || f == Activation::silu || f == Activation::gelu;
}

inline bool keeps_curvature(Activation f) { return f == Activation::silu || f == Activation::gelu; }

struct Sizes {
  int packed, tiles, pass;
};

// Places of layers whose widths and biases are known: their matrices and tiles, activations and cotangents.
FASTMETA_HD constexpr Sizes lay_out(Layer* layer, int layers) {
  Sizes sizes{};
  for (int i = 0; i < layers; ++i) {
    Layer& l = layer[i];
    const int columns = l.in + l.bias;
    l.quads = (columns + 3) / 4, l.stride = row_stride(columns);
    l.w = sizes.packed, l.first_tile = sizes.tiles;
    sizes.packed += whole(l.out, 4) * l.stride;
    sizes.tiles += whole(l.out, 4) / 4 * l.quads;
  }
  for (int i = 0; i < layers; ++i) {
    Layer& l = layer[i];
    l.a_stride = i + 1 < layers ? layer[i + 1].stride : row_stride(l.out);
    l.d_stride = row_stride(l.out);
    l.x = i > 0 ? layer[i - 1].a : absent;
    l.a = sizes.pass, l.d = l.a + l.a_stride;
    sizes.pass = l.d + l.d_stride;
  }
  return sizes;
}

// The layers: their numbers and gradients, their matrices, and their part of a pass.
inline void place_layers(Plan& plan, const Network& net, int differentiated, bool factored) {
  std::int64_t sizes[2 * most_layers] = {};  // by number of the parameter
  for (const Linear& l : net.layers) {
    sizes[l.weight] = std::int64_t{l.in} * l.out;
    if (l.bias != absent) sizes[l.bias] = l.out;
  }
  if (factored) sizes[net.layers[0].weight] = 0;  // its gradient is a product of its own
  const auto place = [&](int parameter) {
    if (parameter == absent || parameter >= differentiated) return std::int64_t{absent};
    std::int64_t before = 0;
    for (int i = 0; i < parameter; ++i) before += sizes[i];
    return before;
  };
  for (int i = 0; i < differentiated; ++i) plan.gradient_elements += sizes[i];
  for (int i = 0; i < plan.layers; ++i) {
    const Linear& given = net.layers[i];
    Layer& l = plan.layer[i];
    l.in = given.in, l.out = given.out, l.activation = given.activation, l.bias = given.bias != absent;
    l.negative_slope = given.negative_slope;
    l.parameter[0] = given.weight, l.parameter[1] = given.bias;
    l.gradient[0] = place(given.weight), l.gradient[1] = place(given.bias);
  }
  if (factored) plan.layer[0].in = net.support, plan.layer[0].gradient[0] = absent;
  const Sizes all = lay_out(plan.layer, plan.layers);
  plan.packed = all.packed, plan.tiles = all.tiles, plan.pass = all.pass;
}

// Everything for one kind of meta-step; `spilled`: its passes are kept in global memory; `factored`: its first layer is.
inline Plan plan_of(const Network& net, const Kind& kind, bool spilled, bool factored) {
  Plan plan{};
  plan.layers = static_cast<int>(net.layers.size());
  plan.loss = net.loss, plan.mean = net.mean, plan.ignored = net.ignored;
  plan.n[0] = net.support, plan.n[1] = net.query;
  for (int i = 0; i < 2; ++i) plan.rows[i] = whole(plan.n[i], rows_at_once);
  plan.steps = kind.steps, plan.adapted = kind.adapted;
  plan.rate_rows = kind.rate_rows, plan.rate_columns = kind.rate_columns;
  plan.gradient = kind.gradient;
  plan.second_order = kind.gradient && kind.second_order && kind.steps > 0;
  plan.learned = kind.gradient && kind.learned && kind.steps > 0;
  plan.kept = plan.second_order || plan.learned;
  plan.spilled = plan.kept && spilled;
  place_layers(plan, net, kind.differentiated, factored);

  const Layer& last = plan.layer[plan.layers - 1];
  const int tangents = plan.pass;  // activations and cotangents have tangents
  for (int i = 0; i < plan.layers; ++i) {
    const bool slope = keeps_slope(plan.layer[i].activation);
    plan.layer[i].s = slope ? plan.pass : absent;
    plan.pass += slope ? plan.layer[i].d_stride : 0;
  }
  plan.p = net.loss == Loss::squared_error ? absent : plan.pass;
  plan.pass += net.loss == Loss::squared_error ? 0 : last.d_stride;
  const int first_order = plan.pass;  // a query set's pass has no curvatures
  for (int i = 0; i < plan.layers; ++i) {
    const bool curvature = plan.second_order && keeps_curvature(plan.layer[i].activation);
    plan.layer[i].c = curvature ? plan.pass : absent;
    plan.pass += curvature ? plan.layer[i].d_stride : 0;
  }

  std::int64_t at = 0;
  const auto take = [&](std::int64_t elements) {
    const std::int64_t place = at;
    at += (elements + 3) / 4 * 4;
    return static_cast<int>(place);  // of a plan too large for shared memory, nothing but `elements` is asked
  };
  const std::int64_t packed = plan.packed, support = plan.rows[0], query = plan.rows[1];
  const bool labels = net.loss == Loss::cross_entropy;
  for (int i = 0; i < 2; ++i) plan.x[i] = take(std::int64_t{plan.rows[i]} * plan.layer[0].stride);
  for (int i = 0; i < 2; ++i) plan.target[i] = take(std::int64_t{plan.n[i]} * (labels ? 1 : last.out));
  for (int i = 0; i < 2; ++i)
    plan.base[i] = factored ? take(std::int64_t{plan.rows[i]} * plan.layer[0].d_stride) : absent;
  plan.rates = take(std::int64_t{plan.steps} * plan.layers * 2);
  plan.phi = take(packed * (!plan.kept ? 1 : plan.spilled ? 2 : plan.steps + 1));
  plan.passes = take(plan.steps == 0 ? 0 : support * plan.pass * (plan.kept && !plan.spilled ? plan.steps : 1));
  plan.query = take(std::max(query * first_order, plan.second_order ? support * tangents : 0));
  plan.u = take(plan.second_order ? packed : 0);
  plan.row_loss = take(std::max(plan.n[0], plan.n[1]));
  plan.scale = take(2);
  plan.partial = take(plan.learned ? 2 * plan.tiles : 0);
  plan.elements = at;
  // One tile a thread, one pair of rows a warp, where a block can have so many threads. Results do not depend on it.
  const int pairs = std::max(support, query) / rows_at_once;
  plan.threads = std::min(most_threads, std::max(warp_size * pairs, whole(plan.tiles, warp_size)));
  plan.threads = std::max(plan.threads, 2 * warp_size);
  return plan;
}

}  // namespace fastmeta::resident
