// The products of the four maps, by Winograd's transform where that wins and directly where it does not; those of the
// tangents are sums of up to two terms. Each thread makes its own of these objects, on what they share and its own
// scratch.
#pragma once

#include "convolve.h"
#include "tiles.h"

namespace fastmeta::conv_block {
namespace {

constexpr std::int64_t gradient_group_bytes = 256 * 1024;

constexpr int most_slices = 3;  // more are so narrow that the transforms of tiles cost what they save

// Winograd where it wins by count of multiplications, with its transforms: of tiles, and of the weight (the constant).
template <class T, class R>
bool prefers_tiles(const Shape& s, const Geometry<R>& g) {
  for (int i = 0; i < 2; ++i)
    if (s.kernel[i] != 3 || s.stride[i] != 1 || s.dilation[i] != 1) return false;
  if (s.data || g.slices > most_slices) return false;
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

  Blocks(const Geometry<R>& g, std::int64_t tiles_, bool gradient, Arena<R>& own) : room(minimum(tiles_, size)) {
    const std::int64_t channels = maximum(g.ci, g.co);
    tiles[0] = own.take(T::all * point_size<R>(room * channels));
    tiles[1] = gradient ? own.take(T::all * point_size<R>(room * channels)) : nullptr;
    products = own.take(T::all * point_size<R>(room * channels));
    offset = own.template take_as<std::int64_t>(channels / width<R>);
  }

  void prepare_own(const Geometry<R>& g) const {
    for (std::int64_t i = 0; i < maximum(g.ci, g.co) / width<R>; ++i) offset[i] = i * room * width<R>;
  }

  // use(the first of some tiles, how many) for blocks of `count` tiles from `first`.
  template <class Use>
  static void for_each(std::int64_t first, std::int64_t count, Use use) {
    for (std::int64_t left = ceil_divide(count, size); left > 0; --left) {
      const std::int64_t tiles = ceil_divide(count, left);
      use(first, tiles);
      first += tiles;
      count -= tiles;
    }
  }

  // products (+)= tiles * points, for matrices [in, out] of slices.
  void multiply_points(const R* from, const R* points, const Sides& in, const Sides& out, std::int64_t count, bool add,
                       int threads) const {
    parallel_for(T::all, threads, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        ahead.ask(i, T::all);
        const R* const a = from + i * point_size<R>(room * in.all);
        const R* const b = points + i * point_size<R>(in.slices * in.each * out.each);
        R* const c = products + i * point_size<R>(room * out.all);
        for (std::int64_t k = 0; k < in.slices; ++k)
          multiply(Product<R>{a, 0, 0, offset + k * in.each / width<R>, in.of(k) / width<R>, b + k * in.each * out.each,
                              out.each, c + k * out.each, 0, 0, out.all, 1, 1, count, out.of(k), add, sum_terms},
                   width<R>);
      }
    });
  }

  // points (+)= x^T d, where both are tiles.
  void outer_points(const R* x, const R* d, const Sides& in, const Sides& out, std::int64_t count, R* points, bool add,
                    int threads) const {
    parallel_for(T::all, threads, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t i = begin; i < end; ++i) {
        const R *a = x + i * point_size<R>(room * in.all), *z = d + i * point_size<R>(room * out.all);
        R* const g = points + i * point_size<R>(in.slices * in.each * out.each);
        for (std::int64_t c = 0; c < in.all; c += width<R>) {
          const std::int64_t k = c / in.each;
          outer_panel(Outer<R>{{}, 0, 0, width<R>, z + k * out.each * room, 0, 0, width<R>, room * width<R>, 1, 1,
                               count, nullptr, out.each, add},
                      a + c * room, g + c * out.each, out.of(k));
        }
      }
    });
  }
};

// Rows of z that one thread makes, whole images or of one image.
struct Piece {
  std::int64_t tile, tiles;  // Winograd's
  std::int64_t first, rows;  // rows of z of all images
};

// z = x * w, which decides branches: by the small tiles, whose rounding is that of the direct product.
template <class R>
class ForwardProduct {
  typedef Tile2x2<R> T;

 public:
  ForwardProduct(const Shape& s, const Geometry<R>& g, Arena<R>& common, Arena<R>& own,
                 Arena<R> none = Arena<R>(nullptr))
      : g_(g), tiled_(prefers_tiles<T>(s, g)), direct_(s, g, tiled_ ? none : common, tiled_ ? none : own),
        grid_(grid_of(s, g, g.n, T::side)), blocks_(g, grid_.tiles(), false, tiled_ ? own : none),
        points_((tiled_ ? common : none).take(T::all * point_size<R>(g.weight() / taps3x3))) {
    const std::int64_t fitting = Blocks<T, R>::size / (grid_.down * grid_.across);
    bands_ = tiled_ && fitting == 0 ? ceil_divide(grid_.down, maximum(1, Blocks<T, R>::size / grid_.across)) : 1;
    pieces_ = ceil_divide(g.n, tiled_ ? maximum(1, fitting) : direct_.group()) * bands_;
  }

  void prepare(const R* w, int threads) {
    if (!tiled_) return direct_.prepare();
    parallel_for(g_.ci, threads, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t i = first; i < last; ++i) transform_weight<T>(g_, w, i, points_);
    });
  }
  void prepare_own() {
    if (tiled_)
      blocks_.prepare_own(g_);
    else
      direct_.prepare_own();
  }

  std::int64_t pieces() const { return pieces_; }
  Piece piece(std::int64_t i) const {
    const std::int64_t all = pieces_ / bands_, part = i / bands_, band = i % bands_;
    const std::int64_t first = g_.n * part / all, images = g_.n * (part + 1) / all - first;
    const std::int64_t upper = grid_.down * band / bands_, lower = grid_.down * (band + 1) / bands_;
    const std::int64_t last = bands_ == 1 ? images * g_.h : minimum(g_.h, lower * T::side);
    return {(first * grid_.down + upper) * grid_.across, ((images - 1) * grid_.down + lower - upper) * grid_.across,
            first * g_.h + upper * T::side, last - upper * T::side};
  }

  // z is that of all images.
  void apply(const R* x, const R* w, const Piece& piece, R* z) {
    if (!tiled_) {
      direct_.paint_group(x, piece.first / g_.h, piece.rows / g_.h, 1);
      direct_.apply(w, piece.rows / g_.h, z + piece.first * g_.w * g_.co, false);
      return;
    }
    blocks_.for_each(piece.tile, piece.tiles, [&](std::int64_t tile, std::int64_t tiles) {
      const Some some{tile, 0, tiles};
      transform_input<T>(grid_, x, g_.ci, some, blocks_.tiles[0], blocks_.room);
      blocks_.ahead = Ahead<R>(grid_, x, g_.ci, tile + tiles, tiles, g_.n);
      blocks_.multiply_points(blocks_.tiles[0], points_, g_.inputs(), g_.outputs(), tiles, false, 1);
      finish_output<T>(grid_, blocks_.products, g_.co, some, z, blocks_.room);
    });
  }

 private:
  const Geometry<R>& g_;
  bool tiled_;
  Direct<R> direct_;
  Grid grid_;
  Blocks<T, R> blocks_;
  R* points_;
  std::int64_t bands_, pieces_;  // bands of an image; pieces of all
};

// z_dot = sum over terms of x * w.
template <class R>
class TangentProduct {
  typedef Tile4x4<R> T;

 public:
  struct Term {
    const R *x, *w;
  };

  TangentProduct(const Shape& s, const Geometry<R>& g, Arena<R>& common, Arena<R>& own,
                 Arena<R> none = Arena<R>(nullptr))
      : g_(g), tiled_(prefers_tiles<T>(s, g)), grid_(grid_of(s, g, g.n, T::side)),
        direct_(s, g, tiled_ ? none : common, tiled_ ? none : own),
        blocks_(g, grid_.tiles(), false, tiled_ ? own : none) {
    for (R*& p : points_) p = (tiled_ ? common : none).take(T::all * point_size<R>(g.weight() / taps3x3));
  }

  void prepare(const Term* terms, int count, int threads) {
    if (!tiled_) return direct_.prepare();
    parallel_for(count * g_.ci, threads, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t i = first; i < last; ++i)
        transform_weight<T>(g_, terms[i / g_.ci].w, i % g_.ci, points_[i / g_.ci]);
    });
  }
  void prepare_own() {
    if (tiled_)
      blocks_.prepare_own(g_);
    else
      direct_.prepare_own();
  }

  std::int64_t pieces() const {
    return tiled_ ? ceil_divide(grid_.tiles(), blocks_.size) : ceil_divide(g_.n, direct_.group());
  }

  void apply(const Term* terms, int count, std::int64_t piece, R* z_dot) {
    const std::int64_t all = tiled_ ? grid_.tiles() : g_.n, first = all * piece / pieces();
    const std::int64_t size = all * (piece + 1) / pieces() - first;
    for (int i = 0; i < count; ++i) {
      if (!tiled_) {
        direct_.paint_group(terms[i].x, first, size, 1);
        direct_.apply(terms[i].w, size, z_dot + first * g_.result(), i > 0);
        continue;
      }
      transform_input<T>(grid_, terms[i].x, g_.ci, Some{first, 0, size}, blocks_.tiles[0], blocks_.room);
      const bool last = i + 1 == count;
      blocks_.ahead = Ahead<R>(grid_, terms[last ? 0 : i + 1].x, g_.ci, last ? first + size : first, size, g_.n);
      blocks_.multiply_points(blocks_.tiles[0], points_[i], g_.inputs(), g_.outputs(), size, i > 0, 1);
    }
    if (tiled_) finish_output<T>(grid_, blocks_.products, g_.co, Some{first, 0, size}, z_dot, blocks_.room);
  }

 private:
  const Geometry<R>& g_;
  bool tiled_;
  Grid grid_;
  Direct<R> direct_;
  Blocks<T, R> blocks_;
  R* points_[2];
};

// Pixels over which one sum of the weight's gradient runs, about: to add two such sums must cost little beside.
constexpr std::int64_t sum_pixels = 980;

// d_x = sum over terms of dz * w^T, d_w = sum over terms of x^T dz. Cotangents come a group of images at a time. The
// sum of d_w is made of those of chunks of images, each computed by one thread, or by all.
template <class R>
class GradientProduct {
  typedef Tile4x4<R> T;

 public:
  struct Term {
    const R* dz;  // of the group
    int weight;   // which of those prepared, -1 for none
    const R* x;   // of all images, null for none
  };

  GradientProduct(const Shape& s, const Geometry<R>& g, int weights, Arena<R>& common, Arena<R>& own,
                  Arena<R> none = Arena<R>(nullptr))
      : g_(g), tiled_(prefers_tiles<T>(s, g)), direct_(s, g, tiled_ ? none : common, tiled_ ? none : own),
        transposed_(s, g, weights, tiled_ || s.data ? none : common, tiled_ || s.data ? none : own),
        chunk_(maximum(1, g.n / maximum(1, minimum(most_parts / 2, g.count() / sum_pixels)))),
        group_(minimum(chunk_, maximum(1, gradient_group_bytes / (g.result() * static_cast<std::int64_t>(sizeof(R)))))),
        grid_(grid_of(s, g, group_, T::side)), blocks_(g, grid_.tiles(), true, tiled_ ? own : none) {
    Arena<R>& tiled_arena = tiled_ ? common : none;
    for (int i = 0; i < weights; ++i) points_[i] = tiled_arena.take(T::all * point_size<R>(g.weight() / taps3x3));
    sum_size_ = tiled_ ? T::all * point_size<R>(g.weight() / taps3x3) : g.weight();
    sums_ = common.take((tiled_ ? chunks() : chunks() - 1) * sum_size_);
  }

  std::int64_t group() const { return group_; }

  void prepare(const R* const* w, int weights, int threads) {
    if (!tiled_) direct_.prepare();
    if (!tiled_ && weights > 0) transposed_.prepare();
    const std::int64_t across = g_.co / width<R>, all = g_.ci / width<R> * across;
    parallel_for(weights * all, threads, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t k = first; k < last; ++k) {
        const std::int64_t which = k / all, i = k % all / across * width<R>, o = k % across * width<R>;
        if (tiled_)
          transform_weight_transposed<T>(g_, w[which], i, o, points_[which]);
        else
          transposed_.turn(w[which], static_cast<int>(which), i, o);
      }
    });
  }
  void prepare_own(bool transposed) {
    if (tiled_) return blocks_.prepare_own(g_);
    direct_.prepare_own();
    if (transposed) transposed_.prepare_own();
  }

  // use(chunk, its first image, the one behind its last, seat, threads that it may use). What is left over when every
  // thread has had as many chunks as the others is for all threads together.
  template <class Use>
  void for_each_chunk(int threads, Use use) const {
    const std::int64_t alone = threads > 1 ? g_.n / chunk_ / threads * threads : chunks();
    const auto call = [&](std::int64_t k, int seat, int inner) {
      use(k, k * chunk_, minimum(g_.n, (k + 1) * chunk_), seat, inner);
    };
    parallel_for(alone, threads, [&](std::int64_t first, std::int64_t last, int seat) {
      for (std::int64_t k = first; k < last; ++k) call(k, seat, 1);
    });
    for (std::int64_t k = alone; k < chunks(); ++k) call(k, 0, threads);
  }

  // Images from `first`; d_x and d_w where they are not null. The first group starts the chunk's sum.
  void apply(const Term* terms, int count, std::int64_t chunk, std::int64_t first, std::int64_t images, R* dx, R* dw,
             int threads) {
    if (dx != nullptr) dx += first * g_.image();
    R* const sum = dw == nullptr ? nullptr : sum_of(chunk, dw);
    const bool add = first > chunk * chunk_;
    if (tiled_) {
      apply_tiled(terms, count, first, images, dx, sum, add, threads);
      return;
    }
    bool more = false;
    for (int i = 0; i < count && dx != nullptr; ++i) {
      if (terms[i].weight < 0) continue;
      transposed_.apply(terms[i].dz, terms[i].weight, images, dx, more, threads);
      more = true;
    }
    for (std::int64_t part = 0; part < images && dw != nullptr; part += direct_.group()) {
      const std::int64_t part_images = minimum(direct_.group(), images - part);
      more = add || part > 0;
      for (int i = 0; i < count; ++i) {
        if (terms[i].x == nullptr) continue;
        direct_.paint_group(terms[i].x, first + part, part_images, threads);
        direct_.weight_gradient(terms[i].dz + part * g_.result(), part_images, sum, more, threads);
        more = true;
      }
    }
  }

  void finish(R* dw, int threads) const {
    if (dw == nullptr) return;
    R* const total = sum_of(0, dw);
    parallel_for(sum_size_ / width<R>, chunks() > 1 ? threads : 1, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t k = 1; k < chunks(); ++k) {
        const R* const sum = sum_of(k, dw);
        for (std::int64_t i = first * width<R>; i < last * width<R>; i += width<R>)
          store(total + i, load(total + i) + load(sum + i));
      }
    });
    if (!tiled_) return;
    parallel_for(g_.ci, threads, [&](std::int64_t first, std::int64_t last, int) {
      finish_weight<T>(g_, total, first, last, dw);
    });
  }

 private:
  std::int64_t chunks() const { return ceil_divide(g_.n, chunk_); }

  R* sum_of(std::int64_t chunk, R* dw) const {
    if (tiled_) return sums_ + chunk * sum_size_;
    return chunk == 0 ? dw : sums_ + (chunk - 1) * sum_size_;
  }

  void apply_tiled(const Term* terms, int count, std::int64_t first, std::int64_t images, R* dx, R* sum, bool add,
                   int threads) {
    grid_.images = images;
    if (dx != nullptr) {
      const std::int64_t row = g_.width * g_.ci;
      parallel_for(images * g_.height, threads, [&](std::int64_t begin, std::int64_t end, int) {
        fill_zero(dx + begin * row, (end - begin) * row);
      });
    }
    blocks_.for_each(0, grid_.tiles(), [&](std::int64_t tile, std::int64_t tiles) {
      bool more_dx = false, more_sum = add || tile > 0;
      for (int i = 0; i < count; ++i) {
        const bool to_dx = dx != nullptr && terms[i].weight >= 0, to_sum = sum != nullptr && terms[i].x != nullptr;
        if (!to_dx && !to_sum) continue;
        parallel_for(tiles, threads, [&](std::int64_t begin, std::int64_t end, int) {
          transform_gradient<T>(grid_, terms[i].dz, g_.co, Some{tile, begin, end}, blocks_.tiles[0], blocks_.room);
        });
        if (to_dx) {
          blocks_.ahead = to_sum ? Ahead<R>(grid_, terms[i].x + first * g_.image(), g_.ci, tile, tiles, images)
                                 : Ahead<R>();
          blocks_.multiply_points(blocks_.tiles[0], points_[terms[i].weight], g_.outputs(), g_.inputs(), tiles, more_dx,
                                  threads);
          more_dx = true;
        }
        if (to_sum) {
          parallel_for(tiles, threads, [&](std::int64_t begin, std::int64_t end, int) {
            transform_input<T>(grid_, terms[i].x + first * g_.image(), g_.ci, Some{tile, begin, end}, blocks_.tiles[1],
                               blocks_.room);
          });
          blocks_.outer_points(blocks_.tiles[1], blocks_.tiles[0], g_.inputs(), g_.outputs(), tiles, sum, more_sum,
                               threads);
          more_sum = true;
        }
      }
      if (!more_dx) return;
      parallel_for(g_.ci / width<R>, threads, [&](std::int64_t begin, std::int64_t end, int) {
        finish_gradient<T>(grid_, blocks_.products, g_.ci, begin * width<R>, end * width<R>, Some{tile, 0, tiles}, dx,
                           blocks_.room);
      });
    });
  }

  const Geometry<R>& g_;
  bool tiled_;
  Direct<R> direct_;
  DirectTransposed<R> transposed_;
  std::int64_t chunk_, group_;  // images
  Grid grid_;
  Blocks<T, R> blocks_;
  R* points_[2];
  R* sums_;
  std::int64_t sum_size_;
};

}  // namespace
}  // namespace fastmeta::conv_block
