// Vectors, beyond common/simd.h: masks, bytes, sums in double precision, and what <cmath> may not be asked for.
#pragma once

#include "elementary.h"
#include "transpose.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace fastmeta {
namespace {

template <class R>
using Mask = typename Simd<R>::Mask;

template <class R>
using Lane = decltype(Mask<R>{}[0] + 0);  // an integer as wide as R

template <class R>
FASTMETA_INLINE Mask<R> splat_mask(int x) {
  return static_cast<Lane<R>>(x) - Mask<R>{};
}

// 0, 1, 2, ... counted from `first`.
template <class R>
FASTMETA_INLINE Mask<R> lanes_from(std::int64_t first) {
  Mask<R> m;
  for (int i = 0; i < width<R>; ++i) m[i] = static_cast<Lane<R>>(first + i);
  return m;
}

// The largest of all lanes, in every lane.
template <class R>
FASTMETA_INLINE Vector<R> largest_everywhere(Vector<R> v) {
  const auto larger = [](Vector<R> a, Vector<R> b) { return select<R>(a > b, a, b); };
  if constexpr (width<R> >= 16) v = larger(v, swapped<8>(v));
  if constexpr (width<R> >= 8) v = larger(v, swapped<4>(v));
  if constexpr (width<R> >= 4) v = larger(v, swapped<2>(v));
  return larger(v, swapped<1>(v));
}

// Whole numbers of `bytes` bytes each, one a lane.
template <class R, int bytes>
struct Whole {
  using Element =
      std::conditional_t<bytes == 1, std::uint8_t, std::conditional_t<bytes == 2, std::uint16_t, std::uint32_t>>;
  typedef Element V __attribute__((vector_size(bytes * width<R>)));
};

// One byte a lane. By steps from one size to the next: GCC converts further ones element by element, and takes half
// vectors apart where one instruction would do.
template <class R>
FASTMETA_INLINE Mask<R> load_bytes(const std::uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<Mask<R>>(_mm512_maskz_cvtepu8_epi32(0xFFFF, all));
  }
#endif
  typename Whole<R, 1>::V b;
  __builtin_memcpy(&b, p, sizeof b);
  const auto twice = __builtin_convertvector(b, typename Whole<R, 2>::V);
  if constexpr (sizeof(R) == 4) return __builtin_convertvector(twice, Mask<R>);
  return __builtin_convertvector(__builtin_convertvector(twice, typename Whole<R, 4>::V), Mask<R>);
}

template <class R>
FASTMETA_INLINE void store_bytes(std::uint8_t* p, Mask<R> m) {
#if defined(__AVX512F__)  // has an instruction for it
  const auto b = __builtin_convertvector(m, typename Whole<R, 1>::V);
#else
  const auto half = __builtin_convertvector(m, typename Whole<R, sizeof(R) / 2>::V);
  const auto b = sizeof(R) == 4 ? __builtin_convertvector(half, typename Whole<R, 1>::V)
                                : __builtin_convertvector(__builtin_convertvector(half, typename Whole<R, 2>::V),
                                                          typename Whole<R, 1>::V);
#endif
  __builtin_memcpy(p, &b, sizeof b);
}

template <class R>
FASTMETA_INLINE R square_root(R x) {
  if constexpr (sizeof(R) == sizeof(float)) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

// sums[lane] += v[lane], in double precision.
template <class R>
FASTMETA_INLINE void accumulate(double* sums, Vector<R> v) {
  typedef double Wide __attribute__((vector_size(width<R> * sizeof(double))));
  Wide w;
  __builtin_memcpy(&w, sums, sizeof w);
  w += __builtin_convertvector(v, Wide);
  __builtin_memcpy(sums, &w, sizeof w);
}

// A square of as many rows as a vector has lanes: to[i][j] = from[j][i].
template <class R>
FASTMETA_INLINE void transpose_square(const R* from, std::int64_t from_row, R* to, std::int64_t to_row) {
  Vector<R> a[width<R>];
#pragma GCC unroll 16
  for (int i = 0; i < width<R>; ++i) a[i] = load(from + i * from_row);
  fastmeta::transpose_square<R>(a);
#pragma GCC unroll 16
  for (int i = 0; i < width<R>; ++i) store(to + i * to_row, a[i]);
}

template <class R>
FASTMETA_INLINE void fill_zero(R* p, std::int64_t n) {
  __builtin_memset(p, 0, static_cast<std::size_t>(n) * sizeof(R));
}

template <int n>
struct Many {
  static constexpr int value = n;
};

// Vectors of channels that go side by side through a loop. Double precision, which is for checks, keeps the code small.
template <class R>
constexpr int side_by_side = sizeof(R) == sizeof(float) ? 4 : 1;

// body(how many vectors, first channel), a few vectors at a time, at most `limit`.
template <class R, int limit = side_by_side<R>, class Body>
FASTMETA_INLINE void in_blocks(std::int64_t channels, Body body) {
  std::int64_t c = 0;
  if constexpr (limit >= 4) {
    for (; c + 4 * width<R> <= channels; c += 4 * width<R>) body(Many<4>{}, c);
    for (; c + 2 * width<R> <= channels; c += 2 * width<R>) body(Many<2>{}, c);
  }
  for (; c < channels; c += width<R>) body(Many<1>{}, c);
}

constexpr std::int64_t minimum(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
constexpr std::int64_t maximum(std::int64_t a, std::int64_t b) { return a < b ? b : a; }
constexpr std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace fastmeta
