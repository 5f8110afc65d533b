// Transposed matrices, square by square in registers.
#pragma once

#include "simd.h"

namespace fastmeta {
namespace {

// The lower (upper) halves of a and b, lane by lane in turn.
template <bool upper, class V>
FASTMETA_INLINE V interleave(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  if constexpr (lanes == 2) {
    return upper ? FASTMETA_SHUFFLE(a, b, 1, 3) : FASTMETA_SHUFFLE(a, b, 0, 2);
  } else if constexpr (lanes == 4) {
    return upper ? FASTMETA_SHUFFLE(a, b, 2, 6, 3, 7) : FASTMETA_SHUFFLE(a, b, 0, 4, 1, 5);
  } else if constexpr (lanes == 8) {
    return upper ? FASTMETA_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
                 : FASTMETA_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else {
    return upper ? FASTMETA_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
                 : FASTMETA_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
}

// Rows a[i] become columns: a[i][j] and a[j][i] change places.
template <class R>
FASTMETA_INLINE void transpose_square(Vector<R> (&a)[width<R>]) {
  constexpr int n = width<R>;
#pragma GCC unroll 4
  for (int stage = 1; stage < n; stage *= 2) {
    Vector<R> b[n];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      b[2 * i] = interleave<false>(a[i], a[i + n / 2]);
      b[2 * i + 1] = interleave<true>(a[i], a[i + n / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) a[i] = b[i];
  }
}

// out [columns, padded(rows)] = the transposed of in [rows, columns], whose rows lie `in_row` apart; padding is zero.
// Rows of `in` that are padded themselves are read in whole vectors.
template <class R>
void transpose(const R* in, std::int64_t in_row, std::int64_t rows, std::int64_t columns, R* out) {
  constexpr std::int64_t n = width<R>;
  const std::int64_t out_row = padded<R>(rows);
  const bool whole = in_row >= padded<R>(columns);
  for (std::int64_t i = 0; i < out_row; i += n) {
    const std::int64_t present = rows - i < n ? rows - i : n;
    for (std::int64_t j = 0; j < columns; j += n) {
      const std::int64_t wanted = columns - j < n ? columns - j : n;
      Vector<R> square[n];
#pragma GCC unroll 16
      for (int r = 0; r < n; ++r) {
        square[r] = Vector<R>{};
        if (r >= present) continue;
        const R* row = in + (i + r) * in_row + j;
        if (whole || wanted == n) {
          square[r] = load(row);
        } else {
          R part[n] = {};
          for (std::int64_t c = 0; c < wanted; ++c) part[c] = row[c];
          square[r] = load(part);
        }
      }
      transpose_square<R>(square);
#pragma GCC unroll 16
      for (int c = 0; c < n; ++c)
        if (c < wanted) store(out + (j + c) * out_row + i, square[c]);
    }
  }
}

}  // namespace
}  // namespace fastmeta
