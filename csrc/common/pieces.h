// Packed parameters of every task, [T, P], and the pieces in which kernels that go element by element pass over them.
#pragma once

#include <cstdint>

// Unrolled too early, the loop over lanes is not turned into vector instructions.
#if defined(__GNUC__) && !defined(__clang__)
#define FASTMETA_KEEP_LOOP _Pragma("GCC unroll 1")
#else
#define FASTMETA_KEEP_LOOP
#endif

namespace fastmeta {

// Sums are split over this many lanes whatever the vector width, so that every instruction set adds in the same order.
constexpr int lanes = 16;

// Part of a row whose parameters share one entry of alpha, or, where alpha is per element, just a part of a row.
struct Piece {
  std::int64_t begin, end, entry;
};

template <class R>
struct Matrix {
  R* data;
  std::int64_t row;  // distance between rows; elements of a row lie side by side
};

}  // namespace fastmeta
