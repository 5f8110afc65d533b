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
using executor::Step;
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

  // Of a step only those rows change that numbers name.
  void scatter(const Primal<R>& p, const R* d, const Step<R>& step, R* table) const {
    const R* from = step.from[0];
    const Vector<R> factor = splat(from != nullptr ? -*step.rate[0] : R(1));
    if (from == nullptr) fill_zero(table, s.rows * row);
    if (from != nullptr && from != table)
      for (std::int64_t j = 0; j < s.rows * row; j += width<R>) store(table + j, load(from + j));
    for (std::int64_t i = 0; i < s.count; ++i) {
      const std::int64_t number = numbers(p)[i];
      if (number == s.padding) continue;
      R* to = table + number * row;
      for (std::int64_t j = 0; j < row; j += width<R>) store(to + j, load(to + j) + factor * load(d + i * row + j));
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
  if (p.dw[0] != nullptr) Layout<R>(shape).scatter(p, p.dy, p.step, p.dw[0]);
}

template <class R>
void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  Layout<R>(shape).gather(p, t.w_dot[0], t.y_dot);
}

template <class R>
void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  if (t.dw_dot[0] != nullptr) Layout<R>(shape).scatter(p, t.dy_dot, t.step, t.dw_dot[0]);
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,    sizes<R>,   pack<R>,             unpack<R>, forward<R>,
                                 backward<R>, tangent<R>, tangent_backward<R>, nullptr,   true};

// A table that does not adapt is read where the caller has it. A task's gradient are the cotangents of the rows that it
// has read, in the order of its numbers.
namespace apart {

template <class R>
Sizes sizes(const void* shape) {
  const Layout<R> l(shape);
  Sizes sizes{};
  sizes.y = sizes.apart = l.s.count * l.row;
  sizes.weights[0] = l.s.rows * l.s.features;
  sizes.rereads_y = false;
  return sizes;
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape);
  for (std::int64_t i = 0; i < l.s.count; ++i) {
    const R* from = p.w[0] + l.numbers(p)[i] * l.s.features;
    for (std::int64_t j = 0; j < l.row; ++j) p.y[i * l.row + j] = j < l.s.features ? from[j] : R(0);
  }
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape);
  if (p.dw[0] == nullptr) return;
  for (std::int64_t j = 0; j < l.s.count * l.row; j += width<R>) store(p.dw[0] + j, load(p.dy + j));
}

template <class R>
void spread(const void* shape, const Primal<R>& p, const R* dw, R* gradient) {
  const Layout<R> l(shape);
  for (std::int64_t i = 0; i < l.s.count; ++i) {
    const std::int64_t number = l.numbers(p)[i];
    if (number == l.s.padding) continue;
    R* to = gradient + number * l.s.features;
    for (std::int64_t j = 0; j < l.s.features; ++j) to[j] += dw[i * l.row + j];
  }
}

// The rows that are read are the same at every step: no derivative comes from here, and none arrives in a product.
template <class R>
void tangent_backward(const void*, const Primal<R>&, const Tangent<R>&, R*) {}

template <class R>
constexpr executor::Maps<R> maps{width<R>, sizes<R>,            nullptr, nullptr, forward<R>, backward<R>,
                                 nullptr,  tangent_backward<R>, nullptr, false,   nullptr,    spread<R>};

}  // namespace apart
}  // namespace

extern const Table table{maps<float>, maps<double>, apart::maps<float>, apart::maps<double>};

}  // namespace fastmeta::embedding::FASTMETA_ISA
