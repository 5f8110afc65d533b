// Products whose right factor is too large to stay at hand: strip by strip it is copied to where a thread keeps it, rows
// of whole vectors one behind the other, and all rows of the left factor meet it there.
#pragma once

#include "product.h"
#include "threads.h"
#include "transpose.h"

namespace fastmeta {
namespace {

// As wide as the widest tile: 96 KiB of the second-level cache, or 24 KiB (12 KiB with vectors of 16 bytes) of the first.
constexpr std::int64_t panel_vectors = vector_registers >= 32 ? 4 : 3;
constexpr std::int64_t panel_depth = vector_registers >= 32 ? 384 : 256;

// Elements of a thread's copy.
template <class R>
constexpr std::int64_t panel_size() {
  return panel_depth * panel_vectors * width<R>;
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

// As `product`, or where every A is turned `turned_product`, on so many threads; `panels` has room for a copy each.
template <class R, bool turned>
void panel_product(const Term<R>* terms, int count, std::int64_t rows, std::int64_t columns,
                   const Result<R>& result, int threads, R* panels) {
  constexpr std::int64_t wide = panel_vectors * width<R>;
  const std::int64_t all = padded<R>(columns), strips = (all + wide - 1) / wide;
  parallel_for(strips, threads, [&](std::int64_t first, std::int64_t last, int seat) {
    R* panel = panels + seat * panel_size<R>();
    for (std::int64_t n = first * wide; n < last * wide && n < all; n += wide) {
      const std::int64_t row = all - n < wide ? all - n : wide;
      Result<R> to = result;
      to.c += n;
      if (to.base != nullptr) to.base += n;
      if (to.from != nullptr) to.from += n;
      for (int t = 0; t < count; ++t) {
        const Term<R>& whole = terms[t];
        for (std::int64_t k = 0; k < whole.depth; k += panel_depth) {
          const std::int64_t kc = whole.depth - k < panel_depth ? whole.depth - k : panel_depth;
          copy_panel(whole, k, kc, n, columns, row, panel);
          const Term<R> part{whole.a + k * (turned ? whole.a_row : 1), whole.a_row, panel, row, kc};
          product_of<R, turned>(&part, 1, rows, row, to);
          to.rate = to.from != nullptr ? to.rate : R(-1);  // what follows is added to what is there
          to.base = nullptr;
          to.from = to.c;
        }
      }
    }
  });
}

}  // namespace
}  // namespace fastmeta
