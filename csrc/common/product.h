// Products of small matrices whose right factor and result have rows of whole vectors, kept in registers tile by tile.
#pragma once

#include "simd.h"

namespace fastmeta {
namespace {

// One product A B of a sum of products. A's rows lie a_row elements apart, or, of a turned A, its columns do, so that a
// transposed A needs no copy; B has rows of whole vectors, b_row elements apart. A turned B, [columns, depth], is for
// products that copy it (panels.h).
template <class R>
struct Term {
  const R* a;
  std::int64_t a_row;
  const R* b;
  std::int64_t b_row;
  std::int64_t depth;
  bool b_turned = false;
};

// c = base (a row for all, or null for zero) + the sum of products; where there is `from`, c = from - rate * the sum.
template <class R>
struct Result {
  R* c;
  std::int64_t row;  // distance between rows of c and of from
  const R* base = nullptr;
  const R* from = nullptr;
  R rate = 0;
};

// A strip of columns: whole vectors, and perhaps half a vector behind them. Half a vector takes the products of two
// steps of the depth at once, one in each half, and costs half as much as the whole one that it is padded to.
template <int whole, bool half>
struct Columns {
  static constexpr int vectors = whole + half;

  // Rows of a tile: with its accumulators, two rows of B and three elements of A still in registers.
  static constexpr int tile_rows() {
    const int rows = half ? (vector_registers - 2 * whole - 4) / vectors : (vector_registers - whole - 1) / whole;
    return rows > 8 ? 8 : rows;
  }
};

// So many tiles, one below the other: rows from m and columns from n of the sum of `count` products.
template <class R, int rows, int whole, bool half, bool turned>
void tiles(const Term<R>* terms, int count, std::int64_t m, std::int64_t number, std::int64_t n,
           const Result<R>& result) {
  constexpr int vectors = whole + half;
  const Result<R> to = result;
  for (; number > 0; --number, m += rows) {
    Vector<R> sums[rows][vectors];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sums[i][j] = to.base != nullptr ? load(to.base + n + j * width<R>) : Vector<R>{};
    for (int t = 0; t < count; ++t) {
      const std::int64_t a_row = terms[t].a_row, b_row = terms[t].b_row;
      const std::int64_t down = turned ? 1 : a_row, along = turned ? a_row : 1;
      const R* a = terms[t].a + m * down;
      const R* b = terms[t].b + n;
      std::int64_t k = terms[t].depth;
      if constexpr (half) {
        for (; k > 1; k -= 2, a += 2 * along, b += 2 * b_row) {
          Vector<R> right[2][whole + 1];
#pragma GCC unroll 4
          for (int j = 0; j < whole; ++j) {
            right[0][j] = load(b + j * width<R>);
            right[1][j] = load(b + b_row + j * width<R>);
          }
          const R* end = b + whole * width<R>;
          const Vector<R> both = halves(load(end), load(end + b_row - width<R> / 2));
#pragma GCC unroll 8
          for (int i = 0; i < rows; ++i) {
            const Vector<R> left[2] = {splat(a[i * down]), splat(a[i * down + along])};
#pragma GCC unroll 4
            for (int j = 0; j < whole; ++j) sums[i][j] += left[0] * right[0][j];
#pragma GCC unroll 4
            for (int j = 0; j < whole; ++j) sums[i][j] += left[1] * right[1][j];
            sums[i][whole] += halves(left[0], left[1]) * both;
          }
        }
      }
      for (; k > 0; --k, a += along, b += b_row) {
        if constexpr (rows * (vectors + 1) + 1 < vector_registers) {  // A's elements fit beside the sums: B's pass by
          Vector<R> left[rows];
#pragma GCC unroll 8
          for (int i = 0; i < rows; ++i) left[i] = splat(a[i * down]);
#pragma GCC unroll 4
          for (int j = 0; j < vectors; ++j) {
            const Vector<R> right = load(b + j * width<R>);
#pragma GCC unroll 8
            for (int i = 0; i < rows; ++i) sums[i][j] += left[i] * right;
          }
        } else {
          Vector<R> right[vectors];
#pragma GCC unroll 4
          for (int j = 0; j < vectors; ++j) right[j] = load(b + j * width<R>);
#pragma GCC unroll 8
          for (int i = 0; i < rows; ++i) {
            const Vector<R> left = splat(a[i * down]);
#pragma GCC unroll 4
            for (int j = 0; j < vectors; ++j) sums[i][j] += left * right[j];
          }
        }
      }
    }
    std::int64_t at = m * to.row + n;
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i, at += to.row) {
      if constexpr (half) sums[i][whole] = halves(sums[i][whole] + swapped<width<R> / 2>(sums[i][whole]), Vector<R>{});
      if (to.from != nullptr) {
#pragma GCC unroll 4
        for (int j = 0; j < vectors; ++j) sums[i][j] = load(to.from + at + j * width<R>) - to.rate * sums[i][j];
      }
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) store(to.c + at + j * width<R>, sums[i][j]);
    }
  }
}

template <class R, int whole, bool half, bool turned>
void strip(const Term<R>* terms, int count, std::int64_t rows, std::int64_t n, const Result<R>& result) {
  constexpr int most = Columns<whole, half>::tile_rows();
  using Tiles = void (*)(const Term<R>*, int, std::int64_t, std::int64_t, std::int64_t, const Result<R>&);
#define FASTMETA_TILES(rows) tiles<R, (rows < most ? rows : most), whole, half, turned>
  static constexpr Tiles of_rows[] = {FASTMETA_TILES(1), FASTMETA_TILES(2), FASTMETA_TILES(3), FASTMETA_TILES(4),
                                      FASTMETA_TILES(5), FASTMETA_TILES(6), FASTMETA_TILES(7), FASTMETA_TILES(8)};
#undef FASTMETA_TILES
  // As even as they can be: a thin tile wastes the pipeline.
  const unsigned all = static_cast<unsigned>(rows), number = (all + most - 1) / most;
  const unsigned least = all / number, taller = all % number;
  if (taller > 0) of_rows[least](terms, count, 0, taller, n, result);
  of_rows[least - 1](terms, count, taller * (least + 1), number - taller, n, result);
}

template <class R, bool turned>
void product_of(const Term<R>* terms, int count, std::int64_t rows, std::int64_t columns, const Result<R>& result) {
  using Strip = void (*)(const Term<R>*, int, std::int64_t, std::int64_t, const Result<R>&);
  static constexpr Strip strips_of[][2] = {{strip<R, 1, false, turned>, strip<R, 0, true, turned>},
                                           {strip<R, 2, false, turned>, strip<R, 1, true, turned>},
                                           {strip<R, 3, false, turned>, strip<R, 2, true, turned>},
                                           {strip<R, 4, false, turned>, strip<R, 3, true, turned>}};
  const std::int64_t vectors = padded<R>(columns) / width<R>, over = columns % width<R>;
  const bool half = over > 0 && over <= width<R> / 2 && vectors > 1;
  // Wide tiles reuse A's element, tall ones B's row: of 32 registers 4 vectors leave 6 rows, of 16 3 leave 4. With half a
  // vector, which takes more registers, 3 of 16 would leave 2.
  const std::int64_t most = vector_registers >= 32 ? 4 : half ? 2 : 3;
  std::int64_t strips = (vectors + most - 1) / most;
  for (std::int64_t j = 0; strips > 0; --strips) {
    const std::int64_t here = strips == 1 ? vectors - j : (vectors - j + strips - 1) / strips;
    strips_of[here - 1][half && strips == 1](terms, count, rows, j * width<R>, result);
    j += here;
  }
}

// A result of rows and columns. Its rows, and those of every B, are padded with zeros to whole vectors.
template <class R>
void product(const Term<R>* terms, int count, std::int64_t rows, std::int64_t columns, const Result<R>& result) {
  product_of<R, false>(terms, count, rows, columns, result);
}

// The same where every A is turned.
template <class R>
void turned_product(const Term<R>* terms, int count, std::int64_t rows, std::int64_t columns,
                    const Result<R>& result) {
  product_of<R, true>(terms, count, rows, columns, result);
}

// c [rows, width]: c[m][o] = base[o] (or zero) plus the sum over `terms` of the dot products of a's row m and b's row o,
// both of `depth` elements in whole vectors. For a few columns, where `product` would compute padding for the most part;
// behind them c is as base is. A row is stored as a whole: what loads it next need not wait for its parts.
template <class R>
void dot_products(const Term<R>* terms, int count, std::int64_t rows, std::int64_t columns, const R* base, R* c) {
  for (std::int64_t m = 0; m < rows; ++m) {
    Vector<R> row = base != nullptr ? load(base) : Vector<R>{};
    for (std::int64_t o = 0; o < columns; ++o) {
      Vector<R> sums{};
      for (int t = 0; t < count; ++t) {
        const R* a = terms[t].a + m * terms[t].a_row;
        const R* b = terms[t].b + o * terms[t].b_row;
        for (std::int64_t k = 0; k < terms[t].depth; k += width<R>) sums += load(a + k) * load(b + k);
      }
      row += lane<R>(o) ? sum_everywhere<R>(sums) : Vector<R>{};
    }
    store(c + m * width<R>, row);
  }
}

}  // namespace
}  // namespace fastmeta
