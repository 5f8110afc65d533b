// Vectors of the instruction set a file is compiled for, by the vector extension of GCC and Clang.
//
// For files named cpu.cpp alone (see isa.h): everything is in an unnamed namespace, one copy a file. Products and sums
// of one expression contract to fused multiply-adds where the instruction set has them.
#pragma once

#include <cstdint>

#if !defined(__GNUC__) && !defined(__clang__)
#error "simd.h needs the vector extension of GCC or Clang"
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

template <class R>
FASTMETA_INLINE R sum(Vector<R> v) {  // halves by halves: the error grows with the logarithm of the width
  R parts[width<R>];
  __builtin_memcpy(parts, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = width<R> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

}  // namespace
}  // namespace fastmeta
