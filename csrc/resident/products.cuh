// Small products of matrices in shared memory, in registers of one thread; and sums over a warp.
//
// Each element of a result is summed in one fixed order, whatever thread has it.
#pragma once

#include "../common/cuda.h"

namespace fastmeta::resident {

template <class R>
struct alignas(16) Quad {
  R v[4];
};

template <class R>
struct alignas(2 * sizeof(R)) Pair {
  R v[2];
};

template <class R>
FASTMETA_DEVICE Quad<R> quad(const R* at) {
  return *reinterpret_cast<const Quad<R>*>(at);
}

template <class R>
FASTMETA_DEVICE void put(R* at, const Quad<R>& value) {
  *reinterpret_cast<Quad<R>*>(at) = value;
}

// Two rows of a times two rows of w, each sum in four parts.
template <class R>
struct Dots {
  R part[2][2][4] = {};

  template <int unrolled>
  FASTMETA_DEVICE void add(const R* a, int a_stride, const R* first, const R* second, int quads) {
#pragma unroll unrolled
    for (int q = 0; q < quads; ++q) {
      const Quad<R> rows[2] = {quad(a + 4 * q), quad(a + a_stride + 4 * q)};
      const Quad<R> columns[2] = {quad(first + 4 * q), quad(second + 4 * q)};
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int f = 0; f < 2; ++f)
#pragma unroll
          for (int i = 0; i < 4; ++i) part[r][f][i] += rows[r].v[i] * columns[f].v[i];
    }
  }

  FASTMETA_DEVICE R sum(int r, int f) const {
    const R* p = part[r][f];
    return (p[0] + p[1]) + (p[2] + p[3]);
  }
};

// Two rows of d times two neighbouring columns of w, over whole quads of w's rows; each sum in two parts.
template <class R>
struct Backs {
  R part[2][2][2] = {};

  template <int unrolled>
  FASTMETA_DEVICE void add(const R* d, int d_stride, const R* w, int w_stride, int quads) {
#pragma unroll unrolled
    for (int q = 0; q < quads; ++q) {
      const Quad<R> rows[2] = {quad(d + 4 * q), quad(d + d_stride + 4 * q)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Pair<R> columns = *reinterpret_cast<const Pair<R>*>(w + (4 * q + i) * w_stride);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int f = 0; f < 2; ++f) part[r][f][i & 1] += rows[r].v[i] * columns.v[f];
      }
    }
  }

  FASTMETA_DEVICE R sum(int r, int f) const { return part[r][f][0] + part[r][f][1]; }
};

// A 4 x 4 tile of d^T a over n rows.
template <class R>
struct Outer {
  R sum[4][4] = {};

  FASTMETA_DEVICE void add(const R* d, int d_stride, const R* a, int a_stride, int n) {
#pragma unroll 2
    for (int s = 0; s < n; ++s) {
      const Quad<R> rows = quad(d + s * d_stride), columns = quad(a + s * a_stride);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += rows.v[i] * columns.v[j];
    }
  }
};

// Sum and maximum over the first `reach` lanes, a power of two; all lanes of the warp come along.
template <class R>
FASTMETA_DEVICE R warp_sum(R value, int reach = 32) {
  for (int away = reach / 2; away > 0; away /= 2) value += __shfl_xor_sync(0xffffffffu, value, away);
  return value;
}

template <class R>
FASTMETA_DEVICE R warp_max(R value, int reach = 32) {
  for (int away = reach / 2; away > 0; away /= 2) {
    const R other = __shfl_xor_sync(0xffffffffu, value, away);
    value = other > value ? other : value;
  }
  return value;
}

// Sum of `count` elements that lie `distance` apart.
template <class R>
FASTMETA_DEVICE R warp_sum_of(const R* first, int count, int distance, int lane) {
  R sum = 0;
  for (int i = lane; i < count; i += 32) sum += first[i * distance];
  return warp_sum(sum);
}

}  // namespace fastmeta::resident
