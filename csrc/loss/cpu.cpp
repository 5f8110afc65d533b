#include "../common/elementary.h"
#include "kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// With r the derivative of a row's loss by its outputs x and H the second one, all four maps are the same for all
// three: dx = scale dy r, y_dot = scale r x_dot, dx_dot = scale (dy H x_dot + dy_dot r), where scale is 1, or 1 over
// what the mean is taken of. Saved: scale, r, and what H is made of.

namespace fastmeta::loss::FASTMETA_ISA {
namespace {

using executor::Primal;
using executor::Sizes;
using executor::Tangent;

template <class R>
struct Layout {
  const Shape& s;
  std::int64_t row;

  explicit Layout(const void* shape) : s(*static_cast<const Shape*>(shape)), row(padded<R>(s.features)) {}

  R& scale(const Primal<R>& p) const { return p.saved[0]; }
  R* residual(const Primal<R>& p) const { return p.saved + width<R>; }
  R* probability(const Primal<R>& p) const { return residual(p) + s.n * row; }  // absent for squared_error
};

template <class R>
Sizes sizes(const void* shape) {
  const Layout<R> l(shape);
  Sizes sizes{};
  sizes.y = 1;
  sizes.rereads_x = sizes.rereads_y = false;
  sizes.saved = width<R> + (l.s.kind == Kind::squared_error ? 1 : 2) * l.s.n * l.row;
  return sizes;
}

// Some numbers that lie without padding, and zeros behind them.
template <class R>
FASTMETA_INLINE Vector<R> padded_row(const R* numbers, std::int64_t count) {
  if (count >= width<R>) return load(numbers);
  Vector<R> row{};
  for (std::int64_t i = 0; i < count; ++i) row = lane<R>(i) ? splat(numbers[i]) : row;
  return row;
}

// A row's squared error. The residual, padded like x, is stored in whole vectors: what loads it next need not wait.
template <class R>
double squared_error(const R* x, const R* target, std::int64_t features, R* residual) {
  double total = 0;
  for (std::int64_t j = 0; j < features; j += width<R>) {
    const Vector<R> difference = load(x + j) - padded_row(target + j, features - j);
    store(residual + j, 2 * difference);
  }
  for (std::int64_t j = 0; j < features; ++j) {
    const double difference = static_cast<double>(x[j] - target[j]);
    total += difference * difference;
  }
  return total;
}

// -log softmax(x)[label], by differences to the largest output so that no exponential overflows.
template <class R>
double cross_entropy(const R* x, std::int64_t label, std::int64_t features, R* residual, R* probability) {
  R largest = x[0];
  for (std::int64_t j = 1; j < features; ++j) largest = x[j] > largest ? x[j] : largest;
  double sum = 0;
  for (std::int64_t j = 0; j < features; j += width<R>) {
    const Vector<R> e = exponential(load(x + j) - largest);
    store(probability + j, e);
    for (std::int64_t i = j; i < features && i < j + width<R>; ++i) sum += static_cast<double>(probability[i]);
  }
  const R inverse = static_cast<R>(1 / sum);
  for (std::int64_t j = 0; j < features; ++j) residual[j] = probability[j] = probability[j] * inverse;
  residual[label] -= 1;
  return __builtin_log(sum) - static_cast<double>(x[label] - largest);
}

// max(x, 0) - x t + log(1 + exp(-|x|)).
template <class R>
double binary_cross_entropy(const R* x, const R* target, std::int64_t features, R* residual, R* probability) {
  double total = 0;
  for (std::int64_t j = 0; j < features; ++j) {
    const double z = static_cast<double>(x[j]), tail = __builtin_exp(z < 0 ? z : -z);
    const double p = (z < 0 ? tail : 1) / (1 + tail);
    total += (z > 0 ? z : 0) - z * static_cast<double>(target[j]) + __builtin_log1p(tail);
    probability[j] = static_cast<R>(p);
    residual[j] = static_cast<R>(p - static_cast<double>(target[j]));
  }
  return total;
}

template <class R>
void forward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape);
  double total = 0;
  std::int64_t count = l.s.kind == Kind::cross_entropy ? 0 : l.s.n * l.s.features;
  for (std::int64_t i = 0; i < l.s.n; ++i) {
    const R* x = p.x[0] + i * l.row;
    R* residual = l.residual(p) + i * l.row;
    R* probability = l.s.kind == Kind::squared_error ? nullptr : l.probability(p) + i * l.row;
    const R* numbers = static_cast<const R*>(p.target) + i * l.s.features;
    switch (l.s.kind) {
      case Kind::squared_error: total += squared_error(x, numbers, l.s.features, residual); continue;
      case Kind::cross_entropy: {
        const std::int64_t label = static_cast<const std::int64_t*>(p.target)[i];
        if (label == l.s.ignored) {
          for (std::int64_t j = 0; j < l.row; ++j) residual[j] = probability[j] = 0;
        } else {
          total += cross_entropy(x, label, l.s.features, residual, probability);
          ++count;
        }
        break;
      }
      case Kind::binary_cross_entropy:
        total += binary_cross_entropy(x, numbers, l.s.features, residual, probability);
        break;
    }
    for (std::int64_t j = l.s.features; j < l.row; ++j) {
      residual[j] = 0;
      if (probability != nullptr) probability[j] = 0;
    }
  }
  const double scale = l.s.mean ? 1 / static_cast<double>(count) : 1;  // of no rows: infinite, and 0 times that NaN
  l.scale(p) = static_cast<R>(scale);
  p.y[0] = static_cast<R>(total * scale);
}

template <class R>
void backward(const void* shape, const Primal<R>& p, R*) {
  const Layout<R> l(shape);
  if (p.dx[0] == nullptr) return;
  const R factor = l.scale(p) * p.dy[0];
  for (std::int64_t i = 0; i < l.s.n * l.row; i += width<R>) store(p.dx[0] + i, factor * load(l.residual(p) + i));
}

template <class R>
void tangent(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  const Layout<R> l(shape);
  double total = 0;
  if (t.x_dot[0] != nullptr)
    for (std::int64_t i = 0; i < l.s.n; ++i)
      for (std::int64_t j = i * l.row; j < i * l.row + l.s.features; ++j)
        total += static_cast<double>(l.residual(p)[j]) * static_cast<double>(t.x_dot[0][j]);
  t.y_dot[0] = static_cast<R>(total) * l.scale(p);
}

// H x_dot of one row: 2 x_dot; (diag(p) - p p^T) x_dot; p (1 - p) x_dot.
template <class R>
void tangent_backward(const void* shape, const Primal<R>& p, const Tangent<R>& t, R*) {
  const Layout<R> l(shape);
  if (t.dx_dot[0] == nullptr) return;
  const R once = l.scale(p) * p.dy[0], again = l.scale(p) * t.dy_dot[0];
  for (std::int64_t i = 0; i < l.s.n; ++i) {
    const R* residual = l.residual(p) + i * l.row;
    const R* probability = l.probability(p) + i * l.row;
    const R* x_dot = t.x_dot[0] == nullptr ? nullptr : t.x_dot[0] + i * l.row;
    R* out = t.dx_dot[0] + i * l.row;
    R mean = 0;
    if (x_dot != nullptr && l.s.kind == Kind::cross_entropy) {
      Vector<R> sums{};
      for (std::int64_t j = 0; j < l.row; j += width<R>) sums += load(probability + j) * load(x_dot + j);
      mean = sum<R>(sums);
    }
    for (std::int64_t j = 0; j < l.row; j += width<R>) {
      Vector<R> value{};
      if (x_dot != nullptr) {
        const Vector<R> d = load(x_dot + j);
        if (l.s.kind == Kind::squared_error) {
          value = 2 * d;
        } else {
          const Vector<R> q = load(probability + j);
          value = l.s.kind == Kind::cross_entropy ? q * (d - mean) : q * (1 - q) * d;
        }
      }
      store(out + j, once * value + again * load(residual + j));
    }
  }
}

template <class R>
constexpr executor::Maps<R> maps{width<R>,   sizes<R>,    nullptr,    nullptr,
                                 forward<R>, backward<R>, tangent<R>, tangent_backward<R>};

}  // namespace

extern const Table table{maps<float>, maps<double>};

}  // namespace fastmeta::loss::FASTMETA_ISA
