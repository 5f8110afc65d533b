// Products whose right factor is too large to stay at hand: strip by strip it is copied to where a thread keeps it, rows
// of whole vectors one behind the other, and all rows of the left factor meet it there.
#pragma once

#include <type_traits>

#include "prefetch.h"
#include "product.h"
#include "threads.h"
#include "transpose.h"

namespace fastmeta {
namespace {

// As wide as the widest tile: 96 KiB, or with vectors of 32 bytes 36 KiB and of 16 bytes 18 KiB.
constexpr std::int64_t panel_vectors = vector_registers >= 32 ? 4 : 3;
constexpr std::int64_t panel_depth = 384;

// A turned left factor is copied as well, a block of its rows at a time, in the order in which tiles read it: where it
// lies, a tile's elements are a row apart for each step of the depth. At most 768 KiB in float, which a thread copies
// once for all its strips; before its copies lies a vector that says whether it did.
constexpr std::int64_t block_rows = 512;
constexpr int block_tile = Columns<panel_vectors, false>::tile_rows();

constexpr std::int64_t at_most(std::int64_t n, std::int64_t limit) { return n < limit ? n : limit; }

template <class R>
constexpr std::int64_t panel_size = panel_depth * panel_vectors * width<R>;

// Elements of a thread's copies, where the left factor has so many rows and such a depth.
template <class R>
constexpr std::int64_t copies_size(std::int64_t rows, std::int64_t depth) {
  return width<R> + panel_size<R> + at_most(rows, block_rows) * at_most(depth, panel_depth);
}

// Depth `kc` from k and vectors from column n of B, as rows of `row` elements.
template <class R>
void copy_panel(const Term<R>& t, std::int64_t k, std::int64_t kc, std::int64_t n, std::int64_t columns,
                std::int64_t row, R* panel) {
  if (t.b_turned) {
    const std::int64_t present = columns - n < row ? columns - n : row;
    transpose(t.b + n * t.b_row + k, t.b_row, present, kc, panel);
    return;
  }
  const R* b = t.b + k * t.b_row + n;
  for (std::int64_t i = 0; i < kc; ++i, b += t.b_row)
    for (std::int64_t j = 0; j < row; j += width<R>) store(panel + i * row + j, load(b + j));
}

// Rows from m and columns from n of a result whose sum comes in parts: the first `begins` it, the others add to it.
template <class R>
Result<R> part_of(const Result<R>& whole, std::int64_t m, std::int64_t n, bool begins) {
  Result<R> part = whole;
  part.c += m * whole.row + n;
  if (!begins) {
    part.base = nullptr;
    part.from = part.c;
    part.rate = whole.from != nullptr ? whole.rate : R(-1);
    return part;
  }
  if (whole.base != nullptr) part.base += n;
  if (whole.from != nullptr) part.from += m * whole.row + n;
  return part;
}

// Calls f(m, height) for tiles as even as they can be.
template <class F>
FASTMETA_INLINE void for_tiles(std::int64_t rows, F f) {
  const std::int64_t number = (rows + block_tile - 1) / block_tile, least = rows / number, taller = rows % number;
  for (std::int64_t i = 0, m = 0; i < number; ++i) {
    const std::int64_t height = i < taller ? least + 1 : least;
    f(m, height);
    m += height;
  }
}

// f(height) with the height of a tile as a constant.
template <class F>
FASTMETA_INLINE void of_height(std::int64_t height, F f) {
  static_assert(block_tile <= 6, "as many as there are cases");
  switch (height) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, at_most(5, block_tile)>{});
    default: return f(std::integral_constant<int, at_most(6, block_tile)>{});
  }
}

// What a tile adds to, and where it is put: lines that come while the one before is computed.
template <class R>
FASTMETA_INLINE void fetch_tile(const Result<R>& tile, std::int64_t height) {
  constexpr std::int64_t line = 64 / sizeof(R);
  for (std::int64_t at = 0; at < height * tile.row; at += tile.row)
    for (std::int64_t j = 0; j < panel_vectors * width<R>; j += line) {
      if (tile.from != nullptr) FASTMETA_PREFETCH_READ(tile.from + at + j);
      FASTMETA_PREFETCH_WRITE(tile.c + at + j);
    }
}

// Strips from one to another of a product, all its rows; `panel` has room for a copy.
template <class R>
void strips_of(const Term<R>* terms, int count, std::int64_t rows, std::int64_t columns, const Result<R>& result,
               std::int64_t first, std::int64_t last, R* panel) {
  constexpr std::int64_t wide = panel_vectors * width<R>;
  const std::int64_t all = padded<R>(columns);
  for (std::int64_t n = first * wide; n < last * wide && n < all; n += wide) {
    const std::int64_t row = at_most(all - n, wide);
    bool begins = true;
    for (int t = 0; t < count; ++t) {
      const Term<R>& whole = terms[t];
      for (std::int64_t k = 0; k < whole.depth; k += panel_depth, begins = false) {
        const std::int64_t kc = at_most(whole.depth - k, panel_depth);
        copy_panel(whole, k, kc, n, columns, row, panel);
        const Term<R> part{whole.a + k, whole.a_row, panel, row, kc};
        product_of<R, false>(&part, 1, rows, row, part_of(result, 0, n, begins));
      }
    }
  }
}

// A block's part of a sum of products: rows from `top`, and of the depth what `part` has.
template <class R>
struct Block {
  Term<R> part;
  std::int64_t top, rows;
  bool begins;
};

// Copies its left factor, tile by tile.
template <class R>
void copy_block(const Block<R>& of, R* block) {
  const std::int64_t kc = of.part.depth;
  for_tiles(of.rows, [&](std::int64_t m, std::int64_t height) {
    of_height(height, [&](auto h) {
      for (std::int64_t i = 0; i < kc; ++i)
        __builtin_memcpy(block + m * kc + i * h, of.part.a + i * of.part.a_row + m, h * sizeof(R));
    });
  });
}

// Strips from one to another of its product; `panel` has room for a copy.
template <class R>
void strips_of(const Block<R>& of, std::int64_t columns, const Result<R>& result, std::int64_t first,
               std::int64_t last, R* panel, const R* block) {
  constexpr std::int64_t wide = panel_vectors * width<R>;
  const std::int64_t all = padded<R>(columns), kc = of.part.depth;
  for (std::int64_t n = first * wide; n < last * wide && n < all; n += wide) {
    const std::int64_t row = at_most(all - n, wide);
    copy_panel(of.part, 0, kc, n, columns, row, panel);
    if (row < wide) {  // has other tiles
      const Term<R> part{of.part.a, of.part.a_row, panel, row, kc};
      product_of<R, true>(&part, 1, of.rows, row, part_of(result, of.top, n, of.begins));
      continue;
    }
    for_tiles(of.rows, [&](std::int64_t m, std::int64_t height) {
      const Result<R> to = part_of(result, of.top + m, n, of.begins);
      fetch_tile(part_of(result, of.top + m + height, n, of.begins), at_most(of.rows - m - height, height));
      of_height(height, [&](auto h) {
        const Term<R> tile{block + m * kc, h, panel, wide, kc};
        tiles<R, h, panel_vectors, false, true>(&tile, 1, 0, 1, 0, to);
      });
    });
  }
}

// As `product`, on so many threads; `copies` has room for each one's.
template <class R>
void panel_product(const Term<R>* terms, int count, std::int64_t rows, std::int64_t columns,
                   const Result<R>& result, int threads, R* copies) {
  constexpr std::int64_t wide = panel_vectors * width<R>;
  parallel_for((padded<R>(columns) + wide - 1) / wide, threads, [&](std::int64_t first, std::int64_t last, int seat) {
    strips_of(terms, count, rows, columns, result, first, last, copies + seat * panel_size<R>);
  });
}

// The same where every A is turned: block by block, so that threads share the strips of one and each copies it once.
template <class R>
void turned_panel_product(const Term<R>* terms, int count, std::int64_t rows, std::int64_t columns,
                          const Result<R>& result, int threads, R* copies) {
  constexpr std::int64_t wide = panel_vectors * width<R>;
  const std::int64_t strips = (padded<R>(columns) + wide - 1) / wide, blocks = (rows + block_rows - 1) / block_rows;
  std::int64_t size = 0;
  for (int t = 0; t < count; ++t) {
    const std::int64_t needed = copies_size<R>(rows, terms[t].depth);
    size = needed > size ? needed : size;
  }
  for (std::int64_t b = 0; b < blocks; ++b) {
    Block<R> of{{}, rows * b / blocks, rows * (b + 1) / blocks - rows * b / blocks, true};
    for (int t = 0; t < count; ++t) {
      const Term<R>& whole = terms[t];
      for (std::int64_t k = 0; k < whole.depth; k += panel_depth, of.begins = false) {
        of.part = whole;
        of.part.a += k * whole.a_row + of.top;
        of.part.b += k * whole.b_row;
        of.part.depth = at_most(whole.depth - k, panel_depth);
        for (int i = 0; i < threads; ++i) copies[i * size] = R(0);
        parallel_for(strips, threads, [&](std::int64_t first, std::int64_t last, int seat) {
          R *copied = copies + seat * size, *panel = copied + width<R>, *block = panel + panel_size<R>;
          if (*copied == R(0)) copy_block(of, block);
          *copied = R(1);
          strips_of(of, columns, result, first, last, panel, block);
        });
      }
    }
  }
}

}  // namespace
}  // namespace fastmeta
