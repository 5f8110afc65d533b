#include "../common/transpose.h"
#include "kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// Data do not vary and want no gradient: the other maps are never called.

namespace fastmeta::data::FASTMETA_ISA {
namespace {

using executor::Primal;
using executor::Sizes;

template <class R>
Sizes sizes(const void* shape) {
  const Shape& s = *static_cast<const Shape*>(shape);
  Sizes sizes{};
  sizes.y = s.n * s.pixels * padded<R>(s.channels);
  return sizes;
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R*) {
  const Shape& s = *static_cast<const Shape*>(shape);
  const std::int64_t row = padded<R>(s.channels);
  for (std::int64_t i = 0; i < s.n; ++i)
    transpose(p.x[0] + i * s.channels * s.pixels, s.pixels, s.channels, s.pixels, p.y + i * s.pixels * row);
}

template <class R>
constexpr executor::Maps<R> maps{width<R>, sizes<R>, nullptr, nullptr, forward<R>, nullptr, nullptr, nullptr};

}  // namespace

extern const Table table{maps<float>, maps<double>};

}  // namespace fastmeta::data::FASTMETA_ISA
