// A block takes one task through its whole meta-step, eq. (1)-(8') of docs/maths.md; sums.cuh sums over tasks.
//
// Warps own rows and go through the network without waiting for each other; the block waits before and after what all
// rows add to: the step of the parameters, and lam - H u of the adjoint. So a step has two barriers each way.
#pragma once

#include "passes.cuh"

namespace fastmeta::resident {

// Where a tile lies: its layer, the row and column of its first element and where that is in a packed vector; and in a
// pass, the rows of cotangents and of what the layer reads, which is the data for the first layer.
template <class P>
struct Place {
  const Layer& l;
  int layer, row, column;

  FASTMETA_DEVICE int element(int i) const { return l.w + (row + i) * l.stride + column; }
  FASTMETA_DEVICE int stride() const { return l.stride; }
  FASTMETA_DEVICE int d() const { return l.d; }
  FASTMETA_DEVICE int d_stride() const { return l.d_stride; }
  FASTMETA_DEVICE int x() const { return l.x; }
  FASTMETA_DEVICE int in() const { return l.in; }
};

template <class P>
FASTMETA_DEVICE Place<P> place_of(const P& plan, int tile) {
  int layer = 0;
  while (layer + 1 < plan.layers && tile >= plan.layer[layer + 1].first_tile) ++layer;
  const int within = tile - plan.layer[layer].first_tile, row = within / plan.layer[layer].quads;
  return {plan.layer[layer], layer, 4 * row, 4 * (within - row * plan.layer[layer].quads)};
}

// Of layers that are known: in registers, so that a thread finds it once.
template <class Shape>
struct Place<Fixed<Shape>> {
  int layer, row, column, first, own_stride, own_d, own_d_stride, own_x, own_in;

  FASTMETA_DEVICE int element(int i) const { return first + i * own_stride; }
  FASTMETA_DEVICE int stride() const { return own_stride; }
  FASTMETA_DEVICE int d() const { return own_d; }
  FASTMETA_DEVICE int d_stride() const { return own_d_stride; }
  FASTMETA_DEVICE int x() const { return own_x; }
  FASTMETA_DEVICE int in() const { return own_in; }
};

template <class Shape>
FASTMETA_DEVICE Place<Fixed<Shape>> place_of(const Fixed<Shape>& plan, int tile) {
  Place<Fixed<Shape>> place{};
  upward(plan, [&](auto i) {
    const Layer& l = plan.at(i);
    if (tile < l.first_tile) return;
    const int within = tile - l.first_tile, row = within / l.quads, column = 4 * (within - row * l.quads);
    place = {int{i}, 4 * row, column, l.w + 4 * row * l.stride + column, l.stride, l.d, l.d_stride, l.x, l.in};
  });
  return place;
}

// One task's state in shared memory.
template <class R>
struct Block {
  R* memory;
  int lane, warp, warps;
  std::int64_t task;

  template <class P>
  FASTMETA_DEVICE Set<R> set(const P& plan, int which) const {
    const R* target = memory + plan.target[which];
    return {memory + plan.x[which], P::factors ? memory + plan.base[which] : nullptr, target,
            reinterpret_cast<const int*>(target), plan.n[which], memory[plan.scale + which]};
  }
  FASTMETA_DEVICE Rows<R> rows(int place, int count, int first) const { return {memory + place, count, first, lane}; }
  template <class P>
  FASTMETA_DEVICE R rate(const P& plan, int k, int layer, int bias) const {
    return memory[plan.rates + (k * plan.layers + layer) * 2 + bias];
  }
};

// Rows of a matrix as they lie in shared memory: `behind` each row a column of its own or a constant, then zeros. An
// empty one has zeros for the rows as well.
template <class R, bool empty = false>
FASTMETA_DEVICE void stage_rows(const Block<R>& block, R* to, int stride, int places, const R* from, int rows,
                                int columns, const R* behind, R constant) {
#pragma unroll 1
  for (int row = block.warp; row < places; row += block.warps) {
#pragma unroll 1
    for (int column = block.lane; column < stride; column += warp_size) {
      R* place = to + row * stride + column;
      if (!empty && row < rows && column < columns) copy_ahead(place, from + row * columns + column);
      else if (row < rows && column == columns && behind != nullptr) copy_ahead(place, behind + row);
      else *place = row < rows && column == columns ? constant : R(0);
    }
  }
}

// Rates of what does not adapt are 0: its step is none, and lam - H u is its gradient, eq. (8').
template <class R, class P>
FASTMETA_DEVICE R rate_of(const P& plan, const Tensors<R>& io, int i) {
  const int k = i / (2 * plan.layers), layer = (i - 2 * k * plan.layers) / 2;
  const int parameter = plan.layer[layer].parameter[i & 1];
  if (parameter == absent || parameter >= plan.adapted) return R(0);
  const int row = plan.rate_rows > 1 ? k : 0, column = plan.rate_columns > 1 ? parameter : 0;
  return io.alpha[row * plan.rate_columns + column];
}

// Copies everything the task reads to shared memory.
template <class R, class P>
FASTMETA_DEVICE void stage(const P& plan, const Tensors<R>& io, const Block<R>& block) {
  const Layer &first = plan.layer[0], &last = plan.layer[plan.layers - 1];
  for (int which = 0; which < 2; ++which) {
    const int n = plan.n[which];
    stage_rows<R>(block, block.memory + plan.x[which], first.stride, plan.rows[which],
                  io.x[which] + block.task * n * first.in, n, first.in, nullptr, first.bias ? R(1) : R(0));
    if constexpr (P::factors)
      stage_rows<R>(block, block.memory + plan.base[which], first.d_stride, plan.rows[which],
                    io.base[which] + block.task * n * first.out, n, first.out, nullptr, R(0));
    if (plan.loss == Loss::cross_entropy) continue;
    const R* target = static_cast<const R*>(io.target[which]) + block.task * n * last.out;
    for (int i = threadIdx.x; i < n * last.out; i += blockDim.x)
      copy_ahead(block.memory + plan.target[which] + i, target + i);
  }
  for (int i = 0; i < plan.layers; ++i) {
    const Layer& l = plan.layer[i];
    R* to = block.memory + plan.phi + l.w;
    const R* bias = l.bias ? io.parameter[i][1] : nullptr;
    if constexpr (P::factors) {
      if (i == 0) {
        stage_rows<R, true>(block, to, l.stride, whole(l.out, 4), nullptr, l.out, l.in, bias, R(0));
        continue;
      }
    }
    stage_rows<R>(block, to, l.stride, whole(l.out, 4), io.parameter[i][0], l.out, l.in, bias, R(0));
  }
  for (int i = threadIdx.x; i < 2 * plan.steps * plan.layers; i += blockDim.x)
    block.memory[plan.rates + i] = rate_of(plan, io, i);
  await_copies();
}

// Labels and what the sums of losses are multiplied by; a label that is no class makes the loss NaN.
template <class R, class P>
FASTMETA_DEVICE void stage_labels(const P& plan, const Tensors<R>& io, const Block<R>& block) {
  const int which = block.warp, n = plan.n[which], classes = plan.layer[plan.layers - 1].out;
  int count = n * classes;
  if (plan.loss == Loss::cross_entropy) {
    const std::int64_t* given = static_cast<const std::int64_t*>(io.target[which]) + block.task * n;
    int* labels = reinterpret_cast<int*>(block.memory + plan.target[which]);
    count = 0;
    for (int i = block.lane; i < n; i += warp_size) {
      const std::int64_t label = given[i];
      const bool counts = label != plan.ignored, right = label >= 0 && label < classes;
      labels[i] = !counts ? ignored_label : right ? static_cast<int>(label) : wrong_label;
      count += counts;
    }
    count = warp_sum(count);
  }
  if (block.lane == 0) block.memory[plan.scale + which] = plan.mean ? R(1) / static_cast<R>(count) : R(1);
}

// The inner loss or the query's, and all cotangents, of every row.
template <bool smooth, class R, class P>
FASTMETA_DEVICE void pass(const P& plan, const Tensors<R>& io, const Block<R>& block, int k) {
  const int which = k == plan.steps;
  const Set<R> set = block.set(plan, which);
  const R* phi = block.memory + plan.phi_at(k);
  const int place = which ? plan.query : plan.pass_at(k);
  const bool curvatures = !which && plan.second_order;
  R factor = 1;
  if (which) factor = io.d_losses == nullptr ? R(1) / static_cast<R>(io.tasks) : io.d_losses[block.task];
  for (int first = rows_at_once * block.warp; first < plan.rows[which]; first += rows_at_once * block.warps) {
    const Rows<R> rows = block.rows(place, plan.rows[which], first);
    forward<smooth>(plan, phi, set, rows, curvatures);
    loss<smooth>(plan, set, rows, factor, block.memory + plan.row_loss, curvatures);
    if (!which || plan.gradient) backward<smooth>(plan, phi, rows, curvatures);
    if (!which || io.outputs == nullptr) continue;
    const Layer& last = plan.layer[plan.layers - 1];
    for (int r = 0; r < rows_at_once && first + r < set.n; ++r)
      for (int j = block.lane; j < last.out; j += warp_size)
        io.outputs[(block.task * set.n + first + r) * last.out + j] = rows.a(last)[r * last.a_stride + j];
  }
}

// The mean or sum of the rows' losses, by the last warp.
template <class R, class P>
FASTMETA_DEVICE void put_loss(const P& plan, const Block<R>& block, int which, R* to) {
  if (to == nullptr || block.warp != block.warps - 1) return;
  const R sum = warp_sum_of(block.memory + plan.row_loss, plan.n[which], 1, block.lane);
  if (block.lane == 0) *to = sum * block.memory[plan.scale + which];
}

// What a layer reads, in a pass of the set `which` or in its tangents; `x` for the first one.
template <class R, class P>
FASTMETA_DEVICE void add_outer(const P& plan, Outer<R>& sums, const Place<P>& at, int which, const R* d_pass,
                               const R* a_pass, const R* x) {
  const int count = plan.rows[which];
  const R* a = x;
  if (at.layer > 0) a = a_pass + count * at.x();
  if (a == nullptr) return;
  sums.add(d_pass + count * at.d() + at.row, at.d_stride(), a + at.column, at.stride(), plan.n[which]);
}

// A tile of a set's gradient. A factored first layer's has the cotangents of the support set's rows for coefficients, none
// of the query set's, which begin_factors hands over, and its bias behind them.
template <class R, class P>
FASTMETA_DEVICE void add_gradient(const P& plan, Outer<R>& sums, const Place<P>& at, int which, const R* d_pass,
                                  const R* a_pass, const R* x) {
  if constexpr (P::factors) {
    if (at.layer == 0) {
      if (at.column + 4 > at.in()) add_outer(plan, sums, at, which, d_pass, a_pass, x);
      const R* d = d_pass + plan.rows[which] * at.d() + at.row;
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (at.column + j < at.in()) sums.sum[i][j] = which == 0 ? d[(at.column + j) * at.d_stride() + i] : R(0);
      return;
    }
  }
  add_outer(plan, sums, at, which, d_pass, a_pass, x);
}

// f(tile, place, sums) for the tiles of this thread.
template <class R, class P, class Add, class Use>
FASTMETA_DEVICE void for_tiles(const P& plan, Add add, Use use) {
  for (int tile = threadIdx.x; tile < plan.tiles; tile += blockDim.x) {
    const Place<P> at = place_of(plan, tile);
    Outer<R> sums;
    add(at, sums);
    use(tile, at, sums);
  }
}

// phi_(k+1) = phi_k - alpha_k g_k, eq. (2) and (3).
template <class R, class P>
FASTMETA_DEVICE void step(const P& plan, const Block<R>& block, int k) {
  const R *pass = block.memory + plan.pass_at(k), *x = block.memory + plan.x[0];
  const R* now = block.memory + plan.phi_at(k);
  R* next = block.memory + plan.phi_at(k + 1);
  for_tiles<R>(
      plan, [&](const Place<P>& at, Outer<R>& g) { add_gradient(plan, g, at, 0, pass, pass, x); },
      [&](int, const Place<P>& at, const Outer<R>& g) {
        const R rates[2] = {block.rate(plan, k, at.layer, 0), block.rate(plan, k, at.layer, 1)};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Quad<R> phi = quad(now + at.element(i));
#pragma unroll
          for (int j = 0; j < 4; ++j) phi.v[j] -= (at.column + j == at.in() ? rates[1] : rates[0]) * g.sum[i][j];
          put(next + at.element(i), phi);
        }
      });
}

// What the first weight's gradient has of the support set's rows, of one row of a tile.
template <class R, class P>
FASTMETA_DEVICE void put_coefficients(const P& plan, const Tensors<R>& io, const Block<R>& block, const Place<P>& at,
                                      int i, const Quad<R>& lam) {
  const int feature = at.row + i, features = plan.first().out;
  if (at.layer > 0 || feature >= features || io.coefficients[0] == nullptr) return;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (at.column + j < at.in())
      io.coefficients[0][(block.task * plan.n[0] + at.column + j) * features + feature] = lam.v[j];
}

// lam of some elements is put where the adjoint's next step finds it, with u = alpha_k lam, eq. (5); or among the results.
template <class R, class P>
FASTMETA_DEVICE void put_lam(const P& plan, const Tensors<R>& io, const Block<R>& block, const Place<P>& at, int i, int k,
                             const Quad<R>& lam) {
  const int place = at.element(i);
  if (k < 0 || !plan.second_order) {
    put(io.task_gradients + block.task * plan.packed + place, lam);
    if constexpr (P::factors) put_coefficients(plan, io, block, at, i, lam);
  }
  if (k < 0) return;
  put(block.memory + plan.lam() + place, lam);
  if (!plan.second_order) return;
  const R rates[2] = {block.rate(plan, k, at.layer, 0), block.rate(plan, k, at.layer, 1)};
  Quad<R> u;
#pragma unroll
  for (int j = 0; j < 4; ++j) u.v[j] = (at.column + j == at.in() ? rates[1] : rates[0]) * lam.v[j];
  put(block.memory + plan.u + place, u);
}

// The query set's part of a factored first layer's lam_K: its coefficients, and as the base of lam, in the place of the
// weight's, its product with the support set's rows.
template <class R, class P>
FASTMETA_DEVICE void begin_factors(const P& plan, const Tensors<R>& io, const Block<R>& block) {
  const Layer& l = plan.first();
  const R *pass = block.memory + plan.query, *d = pass + plan.rows[1] * l.d, *x = block.memory + plan.x[1];
  if (io.coefficients[1] != nullptr)
    for (int row = block.warp; row < plan.n[1]; row += block.warps)
      for (int j = block.lane; j < l.out; j += warp_size)
        io.coefficients[1][(block.task * plan.n[1] + row) * l.out + j] = d[row * l.d_stride + j];
  R* base = block.memory + plan.base[0];
  for_tiles<R>(
      plan,
      [&](const Place<P>& at, Outer<R>& product) {
        if (at.layer == 0) add_outer(plan, product, at, 1, pass, pass, x);
      },
      [&](int, const Place<P>& at, const Outer<R>& product) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (at.layer == 0 && at.column + j < at.in())
              base[(at.column + j) * l.d_stride + at.row + i] = product.sum[i][j];
      });
}

// lam_K, the query loss's gradient.
template <class R, class P>
FASTMETA_DEVICE void begin_adjoint(const P& plan, const Tensors<R>& io, const Block<R>& block) {
  const R *pass = block.memory + plan.query, *x = block.memory + plan.x[1];
  if constexpr (P::factors) begin_factors(plan, io, block);
  for_tiles<R>(
      plan, [&](const Place<P>& at, Outer<R>& g) { add_gradient(plan, g, at, 1, pass, pass, x); },
      [&](int, const Place<P>& at, const Outer<R>& g) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          put_lam(plan, io, block, at, i, plan.kept ? plan.steps - 1 : -1,
                  Quad<R>{{g.sum[i][0], g.sum[i][1], g.sum[i][2], g.sum[i][3]}});
      });
}

// Tangents of every row's activations and cotangents in the direction u_k.
template <bool smooth, class R, class P>
FASTMETA_DEVICE void tangent_pass(const P& plan, const Block<R>& block, int k) {
  const Set<R> set = block.set(plan, 0);
  const R *phi = block.memory + plan.phi_at(k), *u = block.memory + plan.u;
  const R rate = P::factors ? block.rate(plan, k, 0, 0) : R(0);
  for (int first = rows_at_once * block.warp; first < plan.rows[0]; first += rows_at_once * block.warps) {
    const Rows<R> rows = block.rows(plan.pass_at(k), plan.rows[0], first);
    const Rows<R> dots = block.rows(plan.query, plan.rows[0], first);
    tangent<smooth>(plan, phi, u, set, rate, rows, dots);
    loss_tangent<smooth>(plan, set, rows, dots);
    tangent_backward<smooth>(plan, phi, u, rows, dots);
  }
}

// lam_k = lam_(k+1) - H_k u_k, eq. (6).
template <class R, class P>
FASTMETA_DEVICE void adjoint_step(const P& plan, const Tensors<R>& io, const Block<R>& block, int k) {
  const R *pass = block.memory + plan.pass_at(k), *x = block.memory + plan.x[0];
  const R *dots = block.memory + plan.query, *lam = block.memory + plan.lam();
  for_tiles<R>(
      plan,
      [&](const Place<P>& at, Outer<R>& h) {
        add_gradient(plan, h, at, 0, dots, pass, x);
        add_outer<R>(plan, h, at, 0, pass, dots, nullptr);
      },
      [&](int, const Place<P>& at, const Outer<R>& h) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Quad<R> value = quad(lam + at.element(i));
#pragma unroll
          for (int j = 0; j < 4; ++j) value.v[j] -= h.sum[i][j];
          put_lam(plan, io, block, at, i, k - 1, value);
        }
      });
}

// The part of <g_k, lam_(k+1)> that a factored first layer's base has: each row of tiles by its first tile.
template <class R, class P>
FASTMETA_DEVICE R base_product(const P& plan, const Block<R>& block, const Place<P>& at, const R* pass) {
  R sum = 0;
  if (at.layer > 0 || at.column > 0) return sum;
  const int distance = at.d_stride();
  const R *d = pass + plan.rows[0] * at.d() + at.row, *base = block.memory + plan.base[0] + at.row;
  for (int row = 0; row < plan.n[0]; ++row)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += d[row * distance + i] * base[row * distance + i];
  return sum;
}

// <g_k, lam_(k+1)> of each tile's weights and biases, eq. (7).
template <class R, class P>
FASTMETA_DEVICE void tile_products(const P& plan, const Block<R>& block, int k) {
  const R *pass = block.memory + plan.pass_at(k), *x = block.memory + plan.x[0];
  const R* lam = block.memory + plan.lam();
  R* partial = block.memory + plan.partial;
  for_tiles<R>(
      plan, [&](const Place<P>& at, Outer<R>& g) { add_outer(plan, g, at, 0, pass, pass, x); },
      [&](int tile, const Place<P>& at, const Outer<R>& g) {
        R weight = 0, bias = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Quad<R> value = quad(lam + at.element(i));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const R product = g.sum[i][j] * value.v[j];
            if (at.column + j == at.in()) bias += product;
            else weight += product;
          }
        }
        if constexpr (P::factors) weight += base_product(plan, block, at, pass);
        partial[2 * tile] = weight, partial[2 * tile + 1] = bias;
      });
}

// Their sums over tiles.
template <class R, class P>
FASTMETA_DEVICE void put_rate_products(const P& plan, const Tensors<R>& io, const Block<R>& block, int k) {
  for (int i = block.warp; i < 2 * plan.layers; i += block.warps) {
    const int begin = plan.layer[i / 2].first_tile;
    const int end = i / 2 + 1 < plan.layers ? plan.layer[i / 2 + 1].first_tile : plan.tiles;
    const R* first = block.memory + plan.partial + 2 * begin + (i & 1);
    const R sum = warp_sum_of(first, end - begin, 2, block.lane);
    if (block.lane == 0) io.rate_products[(block.task * plan.steps + k) * 2 * plan.layers + i] = sum;
  }
}

// Parameters and pass of a step, to global memory and back.
template <class R, class P>
FASTMETA_DEVICE void spill(const P& plan, const Tensors<R>& io, const Block<R>& block, int k, bool back) {
  R* tape = io.tape + (block.task * plan.steps + k) * plan.tape();
  const int sizes[2] = {plan.packed, plan.rows[0] * plan.pass}, places[2] = {plan.phi, plan.passes};
  for (int part = 0; part < 2; ++part) {
    R* here = block.memory + places[part];
    R* there = tape + (part ? plan.packed : 0);
    for (int i = 4 * threadIdx.x; i < sizes[part]; i += 4 * blockDim.x) {
      if (back) put(here + i, quad<R>(there + i));
      else put(there + i, quad<R>(here + i));
    }
  }
  __syncthreads();
}

template <bool smooth, class R, class P>
FASTMETA_DEVICE void adjoint(const P& plan, const Tensors<R>& io, const Block<R>& block) {
  for (int k = plan.steps - 1; k >= 0; --k) {
    if (plan.spilled) spill(plan, io, block, k, true);
    if (plan.second_order) tangent_pass<smooth>(plan, block, k);
    __syncthreads();
    if (plan.learned) tile_products(plan, block, k);  // of lam before this thread changes it
    if (plan.second_order) adjoint_step(plan, io, block, k);
    if (plan.learned || k > 0) __syncthreads();
    if (plan.learned) put_rate_products(plan, io, block, k);
  }
}

template <class R, class P, bool smooth>
__global__ void __launch_bounds__(most_threads, 1)
    meta_step(const __grid_constant__ P plan, const __grid_constant__ Tensors<R> io) {
  FASTMETA_SHARED(memory);
  const int thread = static_cast<int>(threadIdx.x);
  const Block<R> block{reinterpret_cast<R*>(memory), thread % warp_size, thread / warp_size,
                       static_cast<int>(blockDim.x) / warp_size, static_cast<std::int64_t>(blockIdx.x)};
  admit_next_launch();
  stage(plan, io, block);
  if (block.warp < 2) stage_labels(plan, io, block);
  __syncthreads();
  for (int k = 0; k <= plan.steps; ++k) {
    pass<smooth>(plan, io, block, k);
    __syncthreads();
    if (k == plan.steps) break;
    if (plan.spilled) spill(plan, io, block, k, false);
    step(plan, block, k);
    put_loss(plan, block, 0, io.support_losses == nullptr ? nullptr : io.support_losses + k * io.tasks + block.task);
    __syncthreads();
  }
  put_loss(plan, block, 1, io.losses + block.task);
  if (!plan.gradient) return;
  begin_adjoint(plan, io, block);
  if (!plan.kept) return;
  __syncthreads();
  adjoint<smooth>(plan, io, block);
}

}  // namespace fastmeta::resident
