#include "../common/vectors.h"
#include "kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// Linear in the table: tangents go the way of values, cotangents the way back, and nothing is saved. The executor has
// seen to it that the numbers are rows of the table.

namespace fastmeta::embedding::FASTMETA_ISA {
namespace {

using executor::Primal;
using executor::Sizes;
using executor::Tangent;

template <class R>
struct Layout {
  const Shape& s;
  std::int64_t row;

  explicit Layout(const void* shape) : s(*static_cast<const Shape*>(shape)), row(padded<R>(s.features)) {}

  static const std::int64_t* numbers(const Primal<R>& p) { return reinterpret_cast<const std::int64_t*>(p.x[0]); }

  void gather(const Primal<R>& p, const R* table, R* y) const {
    for (std::int64_t i = 0; i < s.count; ++i)
      for (std::int64_t j = 0; j < row; j += width<R>) store(y + i * row + j, load(table + numbers(p)[i] * row + j));
  }

  void scatter(const Primal<R>& p, const R* d, R* table) const {
    fill_zero(table, s.rows * row);
    for (std::int64_t i = 0; i < s.count; ++i) {
      const std::int64_t number = numbers(p)[i];
      if (number == s.padding) continue;
      R* to = table + number * row;
      for (std::int64_t j = 0; j < row; j += width<R>) store(to + j, load(to + j) + load(d + i * row + j));
    }
  }
};

template <class R>
Sizes sizes(const void* shape) {
  const Layout<R> l(shape);
  Sizes sizes{};
  sizes.y = l.s.count * l.row;
  sizes.weights[0] = l.s.rows * l.row;
  sizes.rereads_y = false;
  return sizes;
}

template <class R>
void pack(const void* shape, int, const R* tensor, R* packed) {
  const Layout<R> l(shape);
  for (std::int64_t i = 0; i < l.s.rows; ++i)
    for (std::int64_t j = 0; j < l.row; ++j)
      packed[i * l.row + j] = j < l.s.features ? tensor[i * l.s.features + j] : R(0);
}

template <class R>
void unpack(const void* shape, int, const R* packed, R* tensor) {
  const Layout<R> l(shape);
  for (std::int64_t i = 0; i < l.s.rows; ++i)
    for (std::int64_t j = 0; j < l.s.features; ++j) tensor[i * l.s.features + j] = packed[i * l.row + j];
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R*) {
  Layout<R>(shape).gather(p, p.w[0], p.y);
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R*) {
  if (p.dw[0] != nullptr) Layout<R>(shape).scatter(p, p.dy, p.dw[0]);
}

template <class R>
void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  Layout<R>(shape).gather(p, t.w_dot[0], t.y_dot);
}

template <class R>
void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  if (t.dw_dot[0] != nullptr) Layout<R>(shape).scatter(p, t.dy_dot, t.dw_dot[0]);
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,   sizes<R>,    pack<R>,    unpack<R>,
                                 forward<R>, backward<R>, tangent<R>, tangent_backward<R>};

}  // namespace

extern const Table table{maps<float>, maps<double>};

}  // namespace fastmeta::embedding::FASTMETA_ISA
