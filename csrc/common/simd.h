// Vectors of the instruction set a file is compiled for, by the vector extension of GCC and Clang.
//
// For files named cpu.cpp alone (see isa.h): everything is in an unnamed namespace, one copy a file. Products and sums
// of one expression contract to fused multiply-adds where the instruction set has them.
#pragma once

#include <cstdint>

#if !defined(__GNUC__) && !defined(__clang__)
#error "simd.h needs the vector extension of GCC or Clang"
#endif

// Elements of a and b by their numbers, b's after a's.
#if defined(__clang__) || __GNUC__ >= 12
#define FASTMETA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FASTMETA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, fastmeta::Numbers<decltype(a)>{__VA_ARGS__})
#endif

#define FASTMETA_INLINE inline __attribute__((always_inline))

namespace fastmeta {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class R>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(vector_bytes)));
  typedef std::int32_t Mask __attribute__((vector_size(vector_bytes)));
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(vector_bytes)));
  typedef std::int64_t Mask __attribute__((vector_size(vector_bytes)));
};

template <class R>
using Vector = typename Simd<R>::V;

// A vector of integers as wide as the elements of V.
template <class V>
using Numbers = decltype(V{} < V{});

// Elements of a vector.
template <class R>
constexpr int width = vector_bytes / static_cast<int>(sizeof(R));

// Registers of the instruction set, which bound what a micro-kernel can keep.
#if defined(__AVX512F__)
constexpr int vector_registers = 32;
#else
constexpr int vector_registers = 16;
#endif

template <class R>
constexpr std::int64_t padded(std::int64_t n) {  // up to whole vectors
  return (n + width<R> - 1) / width<R> * width<R>;
}

// No alignment is asked for.
template <class R>
FASTMETA_INLINE Vector<R> load(const R* p) {
  Vector<R> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class R>
FASTMETA_INLINE void store(R* p, Vector<R> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class R>
FASTMETA_INLINE Vector<R> splat(R x) {
  return x - Vector<R>{};  // a subtraction of zero keeps every bit of x, also of -0
}

// The other half of every 2 * distance lanes.
template <int distance, class V>
FASTMETA_INLINE V swapped(V v) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
#define FASTMETA_LANE(i) ((i) ^ distance)
  if constexpr (lanes == 2) {
    return FASTMETA_SHUFFLE(v, v, FASTMETA_LANE(0), FASTMETA_LANE(1));
  } else if constexpr (lanes == 4) {
    return FASTMETA_SHUFFLE(v, v, FASTMETA_LANE(0), FASTMETA_LANE(1), FASTMETA_LANE(2), FASTMETA_LANE(3));
  } else if constexpr (lanes == 8) {
    return FASTMETA_SHUFFLE(v, v, FASTMETA_LANE(0), FASTMETA_LANE(1), FASTMETA_LANE(2), FASTMETA_LANE(3),
                                   FASTMETA_LANE(4), FASTMETA_LANE(5), FASTMETA_LANE(6), FASTMETA_LANE(7));
  } else {
    return FASTMETA_SHUFFLE(v, v, FASTMETA_LANE(0), FASTMETA_LANE(1), FASTMETA_LANE(2), FASTMETA_LANE(3),
                                   FASTMETA_LANE(4), FASTMETA_LANE(5), FASTMETA_LANE(6), FASTMETA_LANE(7),
                                   FASTMETA_LANE(8), FASTMETA_LANE(9), FASTMETA_LANE(10), FASTMETA_LANE(11),
                                   FASTMETA_LANE(12), FASTMETA_LANE(13), FASTMETA_LANE(14), FASTMETA_LANE(15));
  }
#undef FASTMETA_LANE
}

// The lower half of a's lanes, and the upper half of b's.
template <class V>
FASTMETA_INLINE V halves(V a, V b) {
  constexpr int lanes = sizeof(V) / sizeof(a[0]);
  Numbers<V> lower{};
  for (int i = 0; i < lanes / 2; ++i) lower[i] = -1;
  return lower ? a : b;
}

// A mask of one lane.
template <class R>
FASTMETA_INLINE Numbers<Vector<R>> lane(std::int64_t at) {
  Numbers<Vector<R>> lanes;
  for (int i = 0; i < width<R>; ++i) lanes[i] = i;
  return lanes == static_cast<decltype(+lanes[0])>(at);
}

// The sum of all lanes, in every lane; halves by halves: the error grows with the logarithm of the width.
template <class R>
FASTMETA_INLINE Vector<R> sum_everywhere(Vector<R> v) {
  if constexpr (width<R> >= 16) v += swapped<8>(v);
  if constexpr (width<R> >= 8) v += swapped<4>(v);
  if constexpr (width<R> >= 4) v += swapped<2>(v);
  return v + swapped<1>(v);
}

template <class R>
FASTMETA_INLINE R sum(Vector<R> v) {
  return sum_everywhere<R>(v)[0];
}

}  // namespace
}  // namespace fastmeta
