// Windows over an image: the value a pooled result has, and the way back. Maxima are remembered as bytes, the position
// in the window.
#pragma once

#include "pooling.h"
#include "vectors.h"

namespace fastmeta {
namespace {

// An image and what is pooled from it, both with `co` padded channels.
struct PooledImage {
  std::int64_t h, w, ph, pw, co;

  PooledImage(const Pooling& p, std::int64_t height, std::int64_t width_, std::int64_t channels)
      : h(height), w(width_), ph(height), pw(width_), co(channels) {
    if (p.kind == Pool::none) return;
    ph = places(h, p.kernel[0], p.stride[0], p.padding[0]);
    pw = places(w, p.kernel[1], p.stride[1], p.padding[1]);
  }

  std::int64_t result() const { return h * w * co; }
  std::int64_t pooled() const { return ph * pw * co; }
};

struct Window : Pooling {
  static constexpr bool pools = true, disjoint = false;
};

// The usual one, known to the compiler.
struct Window2x2 {
  static constexpr bool pools = true, disjoint = true;
  static constexpr std::int64_t kernel[2] = {2, 2}, stride[2] = {2, 2}, padding[2] = {0, 0};
};

struct NoWindow {
  static constexpr bool pools = false, disjoint = true;
};

constexpr int max_window = 255;  // what a byte can remember

inline bool is_2x2(const Pooling& p) {
  for (int i = 0; i < 2; ++i)
    if (p.kernel[i] != 2 || p.stride[i] != 2 || p.padding[i] != 0) return false;
  return true;
}

// Whether every window meets the image, and its maximum can be remembered.
inline bool can_pool(const Pooling& p) {
  if (p.kind == Pool::none) return true;
  for (int i = 0; i < 2; ++i)
    if (2 * p.padding[i] > p.kernel[i]) return false;
  return p.kind == Pool::average || p.kernel[0] * p.kernel[1] <= max_window;
}

// visit(index within the window, offset of the pixel) for the pixels of a window that lie in the image.
template <class W, class Visit>
FASTMETA_INLINE void for_each_pixel(const W& win, const PooledImage& g, std::int64_t py, std::int64_t px, Visit visit) {
#pragma GCC unroll 2
  for (int i = 0; i < win.kernel[0]; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < win.kernel[1]; ++j) {
      const std::int64_t y = py * win.stride[0] - win.padding[0] + i, x = px * win.stride[1] - win.padding[1] + j;
      if constexpr (!W::disjoint) {
        if (y < 0 || y >= g.h || x < 0 || x >= g.w) continue;
      }
      visit(static_cast<int>(i * win.kernel[1] + j), (y * g.w + x) * g.co);
    }
}

// Calls body with the windows, as a type of their own where the compiler can make use of it.
template <class Body>
FASTMETA_INLINE void for_window(const Pooling& p, Body body) {
  if (p.kind == Pool::none) {
    body(NoWindow{});
  } else if (is_2x2(p)) {
    body(Window2x2{});
  } else {
    body(Window{p});
  }
}

// y = the maximum over windows of value(j, offset of the pixel); the first of equals is remembered.
template <int many, class R, class W, class Value>
FASTMETA_INLINE void pool_maximum(const W& win, const PooledImage& g, R* y, std::uint8_t* codes, Value value) {
  std::int64_t at = 0;
  for (std::int64_t py = 0; py < g.ph; ++py)
    for (std::int64_t px = 0; px < g.pw; ++px, at += g.co)
#pragma GCC unroll 4
      for (int j = 0; j < many; ++j) {
        Vector<R> best{};
        Mask<R> code{};
        bool started = false;
        for_each_pixel(win, g, py, px, [&](int index, std::int64_t offset) {
          const Vector<R> v = value(j, offset);
          if (started) {
            const Mask<R> take = (v > best) | (v != v);
            best = select<R>(take, v, best);
            code = take ? splat_mask<R>(index) : code;
          } else {
            best = v;
            code = splat_mask<R>(index);
            started = true;
          }
        });
        store(y + at + j * width<R>, best);
        store_bytes<R>(codes + at + j * width<R>, code);
      }
}

// y = value at the pixel remembered.
template <int many, class R, class W, class Value>
FASTMETA_INLINE void pool_remembered(const W& win, const PooledImage& g, const std::uint8_t* codes, R* y, Value value) {
  std::int64_t at = 0;
  for (std::int64_t py = 0; py < g.ph; ++py)
    for (std::int64_t px = 0; px < g.pw; ++px, at += g.co)
#pragma GCC unroll 4
      for (int j = 0; j < many; ++j) {
        const Mask<R> code = load_bytes<R>(codes + at + j * width<R>);
        Vector<R> picked{};
        for_each_pixel(win, g, py, px, [&](int index, std::int64_t offset) {
          picked = select<R>(code == splat_mask<R>(index), value(j, offset), picked);
        });
        store(y + at + j * width<R>, picked);
      }
}

// y = the mean over windows, pixels outside the image counted as zeros.
template <int many, class R, class W, class Value>
FASTMETA_INLINE void pool_average(const W& win, const PooledImage& g, R* y, Value value) {
  const R scale = R(1) / static_cast<R>(win.kernel[0] * win.kernel[1]);
  std::int64_t at = 0;
  for (std::int64_t py = 0; py < g.ph; ++py)
    for (std::int64_t px = 0; px < g.pw; ++px, at += g.co)
#pragma GCC unroll 4
      for (int j = 0; j < many; ++j) {
        Vector<R> total{};
        for_each_pixel(win, g, py, px, [&](int, std::int64_t offset) { total += value(j, offset); });
        store(y + at + j * width<R>, total * splat<R>(scale));
      }
}

// The transpose of either: d[pixel] = what the windows over it pass back. `codes` is null for averages.
template <class R>
void unpool(const Window& win, const PooledImage& g, const R* dy, const std::uint8_t* codes, R* d) {
  const R scale = R(1) / static_cast<R>(win.kernel[0] * win.kernel[1]);
  fill_zero(d, g.result());
  for (std::int64_t py = 0; py < g.ph; ++py)
    for (std::int64_t px = 0; px < g.pw; ++px)
      for (std::int64_t c = 0; c < g.co; c += width<R>) {
        const std::int64_t at = (py * g.pw + px) * g.co + c;
        const Vector<R> v = load(dy + at);
        const Mask<R> code = codes == nullptr ? Mask<R>{} : load_bytes<R>(codes + at);
        for_each_pixel(win, g, py, px, [&](int index, std::int64_t offset) {
          R* to = d + offset + c;
          const Vector<R> part =
              codes == nullptr ? v * splat<R>(scale) : select<R>(code == splat_mask<R>(index), v, Vector<R>{});
          store(to, load(to) + part);
        });
      }
}

// visit(j, offset of the pixel, what comes back of dy, and of dy_dot if it is there) for windows that share no pixel,
// and if `all` for the pixels under no window; end after each row of windows.
template <int many, bool all, class R, class Visit, class End>
FASTMETA_INLINE void unpool_2x2(const PooledImage& g, const R* dy, const R* dy_dot, const std::uint8_t* codes,
                                Visit visit, End end) {
  typedef Vector<R> V;
  const auto nothing = [&](std::int64_t y, std::int64_t x) {
#pragma GCC unroll 4
    for (int j = 0; j < many; ++j) visit(j, (y * g.w + x) * g.co, V{}, V{});
  };
  std::int64_t at = 0;
  for (std::int64_t py = 0; py < g.ph; ++py) {
    for (std::int64_t px = 0; px < g.pw; ++px, at += g.co)
#pragma GCC unroll 4
      for (int j = 0; j < many; ++j) {
        const std::int64_t here = at + j * width<R>;
        const V d = load(dy + here), d_dot = dy_dot == nullptr ? V{} : load(dy_dot + here);
        const Mask<R> code = codes == nullptr ? Mask<R>{} : load_bytes<R>(codes + here);
        for_each_pixel(Window2x2{}, g, py, px, [&](int index, std::int64_t offset) {
          if (codes == nullptr) {
            visit(j, offset, d * splat<R>(R(0.25)), d_dot * splat<R>(R(0.25)));
          } else {
            const Mask<R> here_only = code == splat_mask<R>(index);
            visit(j, offset, select<R>(here_only, d, V{}), select<R>(here_only, d_dot, V{}));
          }
        });
      }
    if constexpr (all) {
      for (std::int64_t x = 2 * g.pw; x < g.w; ++x) {
        nothing(2 * py, x);
        nothing(2 * py + 1, x);
      }
    }
    end();
  }
  if constexpr (all) {
    for (std::int64_t y = 2 * g.ph; y < g.h; ++y)
      for (std::int64_t x = 0; x < g.w; ++x) nothing(y, x);
  }
}

}  // namespace
}  // namespace fastmeta
