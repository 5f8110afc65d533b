// Transposed matrices, square by square in registers.
#pragma once

#include <type_traits>

#include "simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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

// A quarter or half of a vector, or all of it: what instructions that stay within 16 bytes see as one.
template <class R>
struct Part {
  typedef R V __attribute__((vector_size(16)));
  static constexpr int size = 16 / static_cast<int>(sizeof(R));
};

template <class R>
FASTMETA_INLINE typename Part<R>::V load_part(const R* p) {
  typename Part<R>::V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// b behind a, in a vector of twice the size.
template <class V>
FASTMETA_INLINE auto joined(V a, V b) {
  constexpr int n = sizeof(V) / sizeof(a[0]);
#if defined(__clang__) || __GNUC__ >= 12
  if constexpr (n == 2) return __builtin_shufflevector(a, b, 0, 1, 2, 3);
  if constexpr (n == 4) return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
  if constexpr (n == 8) return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  typedef std::remove_reference_t<decltype(a[0])> Twice __attribute__((vector_size(2 * sizeof(V))));
  const V both[2] = {a, b};
  Twice out;
  __builtin_memcpy(&out, both, sizeof out);
  return out;
#endif
}

#if defined(__AVX512F__)
// `v` with a part at lane `at`. A broadcast from memory under a mask leaves the ports that shuffle to the shuffles, which
// a compiler does not find by itself.
template <class R, int at>
FASTMETA_INLINE Vector<R> with_part(Vector<R> v, typename Part<R>::V part) {
  __m512 all;
  __m128 one;
  __builtin_memcpy(&all, &v, sizeof v);
  __builtin_memcpy(&one, &part, sizeof part);
  all = _mm512_mask_broadcast_f32x4(all, static_cast<__mmask16>(15 << 4 * at), one);
  __builtin_memcpy(&v, &all, sizeof v);
  return v;
}
#endif

// The lower (upper) elements of every part of a and b, in turn.
template <bool upper, class V>
FASTMETA_INLINE V interleave_parts(V a, V b) {
  constexpr int n = sizeof(V) / sizeof(a[0]), size = 16 / sizeof(a[0]), u = upper ? size / 2 : 0, w = n + u;
  if constexpr (size == 2 && n == 2) {
    return FASTMETA_SHUFFLE(a, b, u, w);
  } else if constexpr (size == 2 && n == 4) {
    return FASTMETA_SHUFFLE(a, b, u, w, u + 2, w + 2);
  } else if constexpr (size == 2) {
    return FASTMETA_SHUFFLE(a, b, u, w, u + 2, w + 2, u + 4, w + 4, u + 6, w + 6);
  } else if constexpr (n == 4) {
    return FASTMETA_SHUFFLE(a, b, u, w, u + 1, w + 1);
  } else if constexpr (n == 8) {
    return FASTMETA_SHUFFLE(a, b, u, w, u + 1, w + 1, u + 4, w + 4, u + 5, w + 5);
  } else {
    return FASTMETA_SHUFFLE(a, b, u, w, u + 1, w + 1, u + 4, w + 4, u + 5, w + 5, u + 8, w + 8, u + 9, w + 9, u + 12,
                            w + 12, u + 13, w + 13);
  }
}

// The columns of one part's width, from `present` rows that need `pieces` parts behind each other, become rows. Parts
// are put in place on the way from memory, and change elements with each other within parts alone. `exact`: the last
// piece has all its rows.
template <class R, int pieces, bool exact>
FASTMETA_INLINE void transpose_parts(const R* in, std::int64_t in_row, std::int64_t present, R* out,
                                     std::int64_t out_row) {
  constexpr int size = Part<R>::size, lanes = width<R> / size;
  using V = typename Part<R>::V;
  static constexpr R nothing[size] = {};
  const auto lane = [&](int piece, int k) {
    const int row = piece * size + k;
    if (piece >= pieces) return V{};
    return load_part(exact || piece + 1 < pieces || row < present ? in + row * in_row : nothing);
  };
  Vector<R> a[size];
#pragma GCC unroll 4
  for (int k = 0; k < size; ++k) {
    if constexpr (lanes == 1) a[k] = lane(0, k);
    if constexpr (lanes == 2) a[k] = joined(lane(0, k), lane(1, k));
#if defined(__AVX512F__)
    a[k] = with_part<R, 0>(Vector<R>{}, lane(0, k));
    if constexpr (pieces > 1) a[k] = with_part<R, 1>(a[k], lane(1, k));
    if constexpr (pieces > 2) a[k] = with_part<R, 2>(a[k], lane(2, k));
    if constexpr (pieces > 3) a[k] = with_part<R, 3>(a[k], lane(3, k));
#endif
  }
  if constexpr (size == 2) {
    store(out, interleave_parts<false>(a[0], a[1]));
    store(out + out_row, interleave_parts<true>(a[0], a[1]));
  } else {
    const Vector<R> even[2] = {interleave_parts<false>(a[0], a[2]), interleave_parts<true>(a[0], a[2])};
    const Vector<R> odd[2] = {interleave_parts<false>(a[1], a[3]), interleave_parts<true>(a[1], a[3])};
    store(out, interleave_parts<false>(even[0], odd[0]));
    store(out + out_row, interleave_parts<true>(even[0], odd[0]));
    store(out + 2 * out_row, interleave_parts<false>(even[1], odd[1]));
    store(out + 3 * out_row, interleave_parts<true>(even[1], odd[1]));
  }
}

template <class R, int pieces, bool exact>
void transpose_rows(const R* in, std::int64_t in_row, std::int64_t present, std::int64_t columns, R* out,
                    std::int64_t out_row) {
  constexpr std::int64_t lane = Part<R>::size;
  for (std::int64_t at = 0; at < columns; at += lane) {
    const std::int64_t j = at < columns - lane ? at : columns - lane;  // the last part may overlap the one before
    transpose_parts<R, pieces, exact>(in + j, in_row, present, out + j * out_row, out_row);
  }
}

// out [columns, padded(rows)] = the transposed of in [rows, columns], whose rows lie `in_row` apart; padding is zero.
template <class R>
void transpose(const R* in, std::int64_t in_row, std::int64_t rows, std::int64_t columns, R* out) {
  constexpr std::int64_t n = width<R>, lane = Part<R>::size;
  const std::int64_t out_row = padded<R>(rows);
  if (columns < lane) {
    for (std::int64_t j = 0; j < columns; ++j)
      for (std::int64_t i = 0; i < out_row; ++i) out[j * out_row + i] = i < rows ? in[i * in_row + j] : R(0);
    return;
  }
  using Rows = void (*)(const R*, std::int64_t, std::int64_t, std::int64_t, R*, std::int64_t);
  constexpr int most = n / lane;
#define FASTMETA_PIECES(count) \
  {transpose_rows<R, (count < most ? count : most), false>, transpose_rows<R, (count < most ? count : most), true>}
  static constexpr Rows kernels[][2] = {FASTMETA_PIECES(1), FASTMETA_PIECES(2), FASTMETA_PIECES(3), FASTMETA_PIECES(4)};
#undef FASTMETA_PIECES
  for (std::int64_t i = 0; i < rows; i += n) {
    const std::int64_t present = rows - i < n ? rows - i : n;
    kernels[(present - 1) / lane][present % lane == 0](in + i * in_row, in_row, present, columns, out + i, out_row);
  }
}

}  // namespace
}  // namespace fastmeta
