// g[r, :] (+)= sum over pooled pixels of dv[pixel, :] * row r of each channel's own patch: the one at its maximum.
//
// The patches of the four pixels of a window differ by one pixel, so what a channel takes of a row is one of four
// neighbours of the image: they are put into a register once for all channels, and each picks its own. Written with the
// scattered dv (outer.h) it would be four products, three of them with zero.
#pragma once

#include "../common/vectors.h"

namespace fastmeta::conv_block {
namespace {

// Whether there is an instruction by which every lane picks from a register.
template <class R>
constexpr bool lanes_pick = false;

template <class R>
struct Maxima {
  std::int64_t a_row;  // between the image's rows; its pixels lie side by side
  const R* dv;         // [width, channels]
  const std::uint8_t* codes;  // likewise: the place in the window in the lowest two bits
  std::int64_t width, channels;
  std::int64_t g_row;
  bool add;
};

#if defined(__AVX512F__)

template <>
constexpr bool lanes_pick<float> = true;

// Two neighbours and the two below them.
FASTMETA_INLINE Vector<float> window(const float* upper, const float* lower) {
  const __m128i pair = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(upper));
  const __m128 four = _mm_loadh_pi(_mm_castsi128_ps(pair), reinterpret_cast<const __m64*>(lower));
  return reinterpret_cast<Vector<float>>(_mm512_castps128_ps512(four));
}

// In every lane the element that `place` names there.
FASTMETA_INLINE Vector<float> pick(Vector<float> from, Mask<float> place) {
  return reinterpret_cast<Vector<float>>(_mm512_maskz_permutexvar_ps(
      0xFFFF, reinterpret_cast<__m512i>(place), reinterpret_cast<__m512>(from)));
}

template <int count, int vectors>
void maxima_product(const Maxima<float>& o, const float* base, const std::int64_t* offset, std::int64_t channel,
                    float* g) {
  constexpr int lanes = width<float>;
  const float* a[count];
  Vector<float> sums[count][vectors];
#pragma GCC unroll 16
  for (int k = 0; k < count; ++k) {
    a[k] = base + offset[k];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) sums[k][j] = o.add ? load(g + k * o.g_row + j * lanes) : Vector<float>{};
  }
  const float* dv = o.dv + channel;
  const std::uint8_t* codes = o.codes + channel;
  for (std::int64_t x = 0; x < o.width; ++x, dv += o.channels, codes += o.channels) {
    Vector<float> d[vectors];
    Mask<float> place[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) {
      d[j] = load(dv + j * lanes);
      place[j] = load_bytes<float>(codes + j * lanes) & splat_mask<float>(3);
    }
#pragma GCC unroll 16
    for (int k = 0; k < count; ++k) {
      const Vector<float> four = window(a[k] + 2 * x, a[k] + 2 * x + o.a_row);
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sums[k][j] += pick(four, place[j]) * d[j];
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < count; ++k)
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) store(g + k * o.g_row + j * lanes, sums[k][j]);
}

constexpr int max_maxima = 10;  // rows whose sums fit with room for what they are made of

template <int vectors, int count = 1>
void maxima_of(std::int64_t n, const Maxima<float>& o, const float* base, const std::int64_t* offset,
               std::int64_t channel, float* g) {
  if constexpr (count <= max_maxima) {
    if (n == count) {
      maxima_product<count, vectors>(o, base, offset, channel, g);
    } else {
      maxima_of<vectors, count + 1>(n, o, base, offset, channel, g);
    }
  }
}

// All channels, which are whole vectors, of `rows` scattered rows.
inline void outer_at_maxima(const Maxima<float>& o, const float* base, const std::int64_t* offset, std::int64_t rows,
                            float* g) {
  std::int64_t first = 0;
  for (std::int64_t left = ceil_divide(rows, max_maxima); left > 0; --left) {
    const std::int64_t count = ceil_divide(rows - first, left);
    for (std::int64_t channel = 0; channel < o.channels; channel += 2 * width<float>) {
      float* const to = g + first * o.g_row + channel;
      if (channel + width<float> < o.channels) {
        maxima_of<2>(count, o, base, offset + first, channel, to);
      } else {
        maxima_of<1>(count, o, base, offset + first, channel, to);
      }
    }
    first += count;
  }
}

#endif

}  // namespace
}  // namespace fastmeta::conv_block
