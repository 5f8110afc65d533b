// The products of the four maps, by Winograd's transform where that wins and directly where it does not; those of the
// tangents are sums of up to two terms.
#pragma once

#include "convolve.h"
#include "tiles.h"

namespace fastmeta::conv_block {
namespace {

constexpr std::int64_t gradient_group_bytes = 256 * 1024;

// Winograd where it wins by count of multiplications, with its transforms: of tiles, and of the weight (the constant).
template <class T, class R>
bool prefers_tiles(const Shape& s, const Geometry<R>& g) {
  for (int i = 0; i < 2; ++i)
    if (s.kernel[i] != 3 || s.stride[i] != 1 || s.dilation[i] != 1) return false;
  if (s.data) return false;
  const std::int64_t tiles = grid_of(s, g, g.n, T::side).tiles();
  return T::all * (tiles * 5 / 4 + 7) < g.count() * taps3x3;
}

// What a point's sums lose is magnified by the transforms behind them, so they are kept short; shorter ones cost time.
constexpr int sum_terms = 32;

// Winograd's points are matrix products over the tiles of a block, with these buffers between the transforms.
template <class T, class R>
struct Blocks {
  static constexpr std::int64_t size = T::side == 4 ? 42 : 56;  // tiles: whole tiles of pixels for the products
  std::int64_t room;
  R *tiles[2], *products;
  std::int64_t* offset;
  Ahead<R> ahead;

  Blocks(const Geometry<R>& g, std::int64_t tiles_, bool gradient, Arena<R>& arena) : room(minimum(tiles_, size)) {
    const std::int64_t channels = maximum(g.ci, g.co);
    tiles[0] = arena.take(T::all * point_size<R>(room * channels));
    tiles[1] = gradient ? arena.take(T::all * point_size<R>(room * channels)) : nullptr;
    products = arena.take(T::all * point_size<R>(room * channels));
    offset = arena.template take_as<std::int64_t>(channels / width<R>);
    if (arena.base == nullptr) return;
    for (std::int64_t i = 0; i < channels / width<R>; ++i) offset[i] = i * room * width<R>;
  }

  // products (+)= tiles * points, for matrices [in, out].
  void multiply_points(const R* from, const R* points, std::int64_t in, std::int64_t out, std::int64_t count, bool add) const {
    for (int i = 0; i < T::all; ++i) {
      ahead.ask(i, T::all);
      multiply(Product<R>{from + i * point_size<R>(room * in), 0, 0, offset, in / width<R>,
                          points + i * point_size<R>(in * out), out, products + i * point_size<R>(room * out), 0, 0, out, 1, 1,
                          count, out, add, sum_terms},
               width<R>);
    }
  }

  // points (+)= x^T d, where both are tiles.
  void outer_points(const R* x, const R* d, std::int64_t in, std::int64_t out, std::int64_t count, R* points, bool add) const {
    for (int i = 0; i < T::all; ++i)
      for (std::int64_t c = 0; c < in; c += width<R>)
        outer_panel(Outer<R>{{}, 0, 0, width<R>, d + i * point_size<R>(room * out), 0, 0, width<R>, room * width<R>, 1, 1,
                             count, nullptr, out, add},
                    x + i * point_size<R>(room * in) + c * room, points + i * point_size<R>(in * out) + c * out, out);
  }
};

// z = x * w, which decides branches: by the small tiles, whose rounding is that of the direct product.
template <class R>
class ForwardProduct {
  typedef Tile2x2<R> T;

 public:
  ForwardProduct(const Shape& s, const Geometry<R>& g, Arena<R>& arena, Arena<R> none = Arena<R>(nullptr))
      : g_(g), tiled_(prefers_tiles<T>(s, g)), direct_(s, g, tiled_ ? none : arena),
        grid_(grid_of(s, g, direct_.group(), T::side)), blocks_(g, grid_.tiles(), false, tiled_ ? arena : none) {
    points_ = (tiled_ ? arena : none).take(T::all * point_size<R>(g.ci * g.co));
  }

  std::int64_t group() const { return direct_.group(); }

  void prepare(const R* w) {
    w_ = w;
    if (tiled_) transform_weight<T>(g_, w, points_);
  }

  // Images from `first`, at most a group of them; z is theirs.
  void apply(const R* x, std::int64_t first, std::int64_t images, R* z) {
    if (!tiled_) {
      direct_.paint_group(x, first, images);
      direct_.apply(w_, images, z, false);
      return;
    }
    grid_.images = images;
    std::int64_t tile = 0;
    for (std::int64_t left = ceil_divide(grid_.tiles(), blocks_.size); left > 0; --left) {
      const std::int64_t tiles = ceil_divide(grid_.tiles() - tile, left);
      transform_input<T>(grid_, x + first * g_.image(), g_.ci, tile, tiles, blocks_.tiles[0], blocks_.room);
      blocks_.ahead = Ahead<R>(grid_, x + first * g_.image(), g_.ci, tile + tiles, tiles, g_.n - first);
      blocks_.multiply_points(blocks_.tiles[0], points_, g_.ci, g_.co, tiles, false);
      finish_output<T>(grid_, blocks_.products, g_.co, tile, tiles, z, blocks_.room);
      tile += tiles;
    }
  }

 private:
  const Geometry<R>& g_;
  bool tiled_;
  Direct<R> direct_;
  Grid grid_;
  Blocks<T, R> blocks_;
  R* points_;
  const R* w_ = nullptr;
};

// z_dot = sum over terms of x * w.
template <class R>
class TangentProduct {
  typedef Tile4x4<R> T;

 public:
  struct Term {
    const R *x, *w;
  };

  TangentProduct(const Shape& s, const Geometry<R>& g, Arena<R>& arena, Arena<R> none = Arena<R>(nullptr))
      : g_(g), tiled_(prefers_tiles<T>(s, g)), grid_(grid_of(s, g, g.n, T::side)), direct_(s, g, tiled_ ? none : arena),
        blocks_(g, grid_.tiles(), false, tiled_ ? arena : none) {
    for (R*& p : points_) p = (tiled_ ? arena : none).take(T::all * point_size<R>(g.ci * g.co));
  }

  void apply(const Term* terms, int count, R* z_dot) {
    if (count == 0) fill_zero(z_dot, g_.n * g_.result());
    if (tiled_) {
      apply_tiled(terms, count, z_dot);
      return;
    }
    for (std::int64_t first = 0; first < g_.n; first += direct_.group()) {
      const std::int64_t images = minimum(direct_.group(), g_.n - first);
      for (int i = 0; i < count; ++i) {
        direct_.paint_group(terms[i].x, first, images);
        direct_.apply(terms[i].w, images, z_dot + first * g_.result(), i > 0);
      }
    }
  }

 private:
  void apply_tiled(const Term* terms, int count, R* z_dot) {
    for (int i = 0; i < count; ++i) transform_weight<T>(g_, terms[i].w, points_[i]);
    std::int64_t first = 0;
    for (std::int64_t left = ceil_divide(grid_.tiles(), blocks_.size); left > 0 && count > 0; --left) {
      const std::int64_t tiles = ceil_divide(grid_.tiles() - first, left);
      for (int i = 0; i < count; ++i) {
        transform_input<T>(grid_, terms[i].x, g_.ci, first, tiles, blocks_.tiles[0], blocks_.room);
        const bool last = i + 1 == count;
        blocks_.ahead = Ahead<R>(grid_, terms[last ? 0 : i + 1].x, g_.ci, last ? first + tiles : first, tiles, g_.n);
        blocks_.multiply_points(blocks_.tiles[0], points_[i], g_.ci, g_.co, tiles, i > 0);
      }
      finish_output<T>(grid_, blocks_.products, g_.co, first, tiles, z_dot, blocks_.room);
      first += tiles;
    }
  }

  const Geometry<R>& g_;
  bool tiled_;
  Grid grid_;
  Direct<R> direct_;
  Blocks<T, R> blocks_;
  R* points_[2];
};

// d_x = sum over terms of dz * w^T, d_w = sum over terms of x^T dz. Cotangents come a group of images at a time.
template <class R>
class GradientProduct {
  typedef Tile4x4<R> T;

 public:
  struct Term {
    const R* dz;  // of the group
    int weight;   // which of those prepared, -1 for none
    const R* x;   // of all images, null for none
  };

  GradientProduct(const Shape& s, const Geometry<R>& g, int weights, Arena<R>& arena, Arena<R> none = Arena<R>(nullptr))
      : g_(g), tiled_(prefers_tiles<T>(s, g)), direct_(s, g, tiled_ ? none : arena),
        transposed_(s, g, weights, tiled_ || s.data ? none : arena),
        group_(minimum(g.n, maximum(1, gradient_group_bytes / (g.result() * static_cast<std::int64_t>(sizeof(R)))))),
        grid_(grid_of(s, g, group_, T::side)), blocks_(g, grid_.tiles(), true, tiled_ ? arena : none) {
    Arena<R>& tiled_arena = tiled_ ? arena : none;
    for (int i = 0; i < weights; ++i) points_[i] = tiled_arena.take(T::all * point_size<R>(g.ci * g.co));
    gradient_ = tiled_arena.take(T::all * point_size<R>(g.ci * g.co));
  }

  std::int64_t group() const { return group_; }

  void prepare(const R* w, int which) {
    if (tiled_) {
      transform_weight_transposed<T>(g_, w, points_[which]);
    } else {
      transposed_.turn(w, which);
    }
  }

  // Images from `first`; d_x and d_w where they are not null. The first group starts d_w.
  void apply(const Term* terms, int count, std::int64_t first, std::int64_t images, R* dx, R* dw) {
    if (dx != nullptr) dx += first * g_.image();
    if (tiled_) {
      apply_tiled(terms, count, first, images, dx, dw);
      return;
    }
    bool more = false;
    for (int i = 0; i < count && dx != nullptr; ++i) {
      if (terms[i].weight < 0) continue;
      transposed_.apply(terms[i].dz, terms[i].weight, images, dx, more);
      more = true;
    }
    for (std::int64_t part = 0; part < images && dw != nullptr; part += direct_.group()) {
      const std::int64_t part_images = minimum(direct_.group(), images - part);
      more = first + part > 0;
      for (int i = 0; i < count; ++i) {
        if (terms[i].x == nullptr) continue;
        direct_.paint_group(terms[i].x, first + part, part_images);
        direct_.weight_gradient(terms[i].dz + part * g_.result(), part_images, dw, more);
        more = true;
      }
    }
  }

  void finish(R* dw) {
    if (tiled_ && dw != nullptr) finish_weight<T>(g_, gradient_, dw);
  }

 private:
  void apply_tiled(const Term* terms, int count, std::int64_t first, std::int64_t images, R* dx, const R* dw) {
    grid_.images = images;
    if (dx != nullptr) fill_zero(dx, images * g_.image());
    std::int64_t tile = 0;
    for (std::int64_t left = ceil_divide(grid_.tiles(), blocks_.size); left > 0; --left) {
      const std::int64_t tiles = ceil_divide(grid_.tiles() - tile, left);
      bool more_dx = false, more_dw = first + tile > 0;
      for (int i = 0; i < count; ++i) {
        const bool to_dx = dx != nullptr && terms[i].weight >= 0, to_dw = dw != nullptr && terms[i].x != nullptr;
        if (!to_dx && !to_dw) continue;
        transform_gradient<T>(grid_, terms[i].dz, g_.co, tile, tiles, blocks_.tiles[0], blocks_.room);
        if (to_dx) {
          blocks_.ahead = to_dw ? Ahead<R>(grid_, terms[i].x + first * g_.image(), g_.ci, tile, tiles, images)
                                : Ahead<R>();
          blocks_.multiply_points(blocks_.tiles[0], points_[terms[i].weight], g_.co, g_.ci, tiles, more_dx);
          more_dx = true;
        }
        if (to_dw) {
          transform_input<T>(grid_, terms[i].x + first * g_.image(), g_.ci, tile, tiles, blocks_.tiles[1], blocks_.room);
          blocks_.outer_points(blocks_.tiles[1], blocks_.tiles[0], g_.ci, g_.co, tiles, gradient_, more_dw);
          more_dw = true;
        }
      }
      if (more_dx) finish_gradient<T>(grid_, blocks_.products, g_.ci, tile, tiles, dx, blocks_.room);
      tile += tiles;
    }
  }

  const Geometry<R>& g_;
  bool tiled_;
  Direct<R> direct_;
  DirectTransposed<R> transposed_;
  std::int64_t group_;
  Grid grid_;
  Blocks<T, R> blocks_;
  R *points_[2], *gradient_;
};

}  // namespace
}  // namespace fastmeta::conv_block
