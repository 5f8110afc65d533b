#include "../common/pool.h"
#include "kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// Linear, once it is known which pixel is a window's maximum: tangents go the way of values, and cotangents back.

namespace fastmeta::pool::FASTMETA_ISA {
namespace {

using executor::Primal;
using executor::Sizes;
using executor::Tangent;

template <class R>
PooledImage image_of(const Shape& s) {
  return PooledImage(s.pool, s.height, s.width, padded<R>(s.channels));
}

bool supported(const Shape& s) {
  const PooledImage g = image_of<float>(s);
  return s.n > 0 && g.ph > 0 && g.pw > 0 && can_pool(s.pool);
}

template <class R>
struct Images {
  const Shape& s;
  const PooledImage g;
  std::uint8_t* codes;  // null where the pool is no maximum

  Images(const void* shape, R* saved)
      : s(*static_cast<const Shape*>(shape)),
        g(image_of<R>(s)),
        codes(s.pool.kind == Pool::max ? reinterpret_cast<std::uint8_t*>(saved) : nullptr) {}

  std::uint8_t* codes_of(std::int64_t image) const { return codes == nullptr ? nullptr : codes + image * g.pooled(); }

  // Calls use(window, x, y, codes) for every image and vector of channels.
  template <class Use>
  void for_each(const R* x, R* y, Use use) const {
    const auto with = [&](const auto& window) {
      for (std::int64_t i = 0; i < s.n; ++i)
        for (std::int64_t c = 0; c < g.co; c += width<R>)
          use(window, x + i * g.result() + c, y + i * g.pooled() + c, codes == nullptr ? nullptr : codes_of(i) + c);
    };
    if (is_2x2(s.pool)) {
      with(Window2x2{});
    } else {
      with(Window{s.pool});
    }
  }

  void back(const R* dy, R* dx) const {
    for (std::int64_t i = 0; i < s.n; ++i)
      unpool(Window{s.pool}, g, dy + i * g.pooled(), codes_of(i), dx + i * g.result());
  }
};

template <class R>
Sizes sizes(const void* shape) {
  const Images<R> images(shape, nullptr);
  Sizes sizes{};
  sizes.y = images.s.n * images.g.pooled();
  sizes.rereads_x = sizes.rereads_y = false;
  if (images.s.pool.kind == Pool::max) sizes.saved = ceil_divide(sizes.y, static_cast<std::int64_t>(sizeof(R)));
  return sizes;
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R*) {
  const Images<R> images(shape, p.saved);
  images.for_each(p.x[0], p.y, [&](const auto& window, const R* x, R* y, std::uint8_t* codes) {
    const auto value = [=](int, std::int64_t at) { return load(x + at); };
    if (images.s.pool.kind == Pool::max) {
      pool_maximum<1>(window, images.g, y, codes, value);
    } else {
      pool_average<1>(window, images.g, y, value);
    }
  });
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R*) {
  if (p.dx[0] != nullptr) Images<R>(shape, p.saved).back(p.dy, p.dx[0]);
}

template <class R>
void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  const Images<R> images(shape, p.saved);
  images.for_each(t.x_dot[0], t.y_dot, [&](const auto& window, const R* x, R* y, const std::uint8_t* codes) {
    const auto value = [=](int, std::int64_t at) { return load(x + at); };
    if (images.s.pool.kind == Pool::max) {
      pool_remembered<1>(window, images.g, codes, y, value);
    } else {
      pool_average<1>(window, images.g, y, value);
    }
  });
}

template <class R>
void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  if (t.dx_dot[0] != nullptr) Images<R>(shape, p.saved).back(t.dy_dot, t.dx_dot[0]);
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,   sizes<R>,    nullptr,    nullptr,
                                 forward<R>, backward<R>, tangent<R>, tangent_backward<R>};

}  // namespace

extern const Table table{supported, maps<float>, maps<double>};

}  // namespace fastmeta::pool::FASTMETA_ISA
