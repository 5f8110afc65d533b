#include "../common/curves.h"
#include "../common/panels.h"
#include "../common/vectors.h"
#include "kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

// With z_l = a_{l-1} W_l^T + b_l and a_l = f_l(z_l), the gradient is d_l^T a_{l-1} and sum d_l with d_l = dL/dz_l =
// f_l' (d_{l+1} W_{l+1}). Its derivative is symmetric: the pull-back of cotangents V_l, v_l is the tangent along them,
//   z'_l = a'_{l-1} W_l^T + a_{l-1} V_l^T + v_l,  a'_l = f_l' z'_l,  a'_0 = 0,
//   d'_l = f_l' (d'_{l+1} W_{l+1} + d_{l+1} V_{l+1}) + f_l'' / f_l' z'_l d_l,
// begun by the loss's second derivative times its argument's tangent: d'_l^T a_{l-1} + d_l^T a'_{l-1} and sum d'_l.

namespace fastmeta::perceptron::FASTMETA_ISA {
namespace {

// Rows that products read in whole vectors.
template <class R>
struct Rows {
  const R* p;
  std::int64_t row;
};

// Memory that is handed out piece by piece.
template <class R>
struct Pieces {
  R* next;

  R* take(std::int64_t elements) {
    R* piece = next;
    next += row_of<R>(elements);
    return piece;
  }

  // As they lie, or a copy with zeros behind each row.
  Rows<R> rows(const R* from, std::int64_t rows, std::int64_t columns) {
    if (columns % width<R> == 0) return {from, columns};
    const std::int64_t row = row_of<R>(columns);
    R* copy = take(rows * row);
    for (std::int64_t i = 0; i < rows; ++i) {
      __builtin_memcpy(copy + i * row, from + i * columns, sizeof(R) * columns);
      fill_zero(copy + i * row + columns, row - columns);
    }
    return {copy, row};
  }
};

template <class R>
std::int64_t workspace(const Net& net) {
  std::int64_t total = 0, widest = row_of<R>(net.layers[net.depth - 1].out);
  for (int l = 0; l < net.depth; ++l) {
    const Layer& layer = net.layers[l];
    const std::int64_t in = row_of<R>(layer.in), out = row_of<R>(layer.out);
    total += net.rows * (in + 2 * out) + 3 * row_of<R>(layer.out * in) + out;
    widest = in > widest ? in : widest;
  }
  return total + (3 * net.rows + 1) * widest + row_of<R>(2 * net.rows) + row_of<R>(panel_size<R>);
}

// f(curve) with a curve whose derivatives are functions of its result.
template <class R, class F>
FASTMETA_INLINE void with_curve(Activation activation, F f) {
  switch (activation) {
    case Activation::relu: return f(Curve<R, Activation::relu>{});
    case Activation::tanh: return f(Curve<R, Activation::tanh>{});
    case Activation::sigmoid: return f(Curve<R, Activation::sigmoid>{});
    default: return;
  }
}

// f'' / f' at the point of the result y.
template <class R, Activation activation>
FASTMETA_INLINE Vector<R> bend_by_slope(Curve<R, activation>, Vector<R> y) {
  if constexpr (activation == Activation::tanh) return -2 * y;
  return 1 - 2 * y;
}

// to = f' from; with z_dot and d, f' from + f'' / f' z_dot d. Rows of `to`, `from`, z_dot and d lie alike.
template <class R>
void times_slope(Activation activation, const Rows<R>& y, std::int64_t rows, std::int64_t features, const R* from,
                 R* to, const R* z_dot = nullptr, const R* d = nullptr) {
  const std::int64_t row = row_of<R>(features);
  with_curve<R>(activation, [=](auto curve) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < features; j += width<R>) {
        const std::int64_t at = i * row + j;
        const Vector<R> result = load(y.p + i * y.row + j);
        Vector<R> value = curve.slope(result, Vector<R>{}, R(0)) * load(from + at);
        if constexpr (curve.bends)
          if (z_dot != nullptr) value += bend_by_slope(curve, result) * load(z_dot + at) * load(d + at);
        store(to + at, value);
      }
  });
}

// 1 over what the mean is taken of, or 1.
template <class R>
R scale_of(const Net& net, const std::int64_t* labels) {
  if (!net.mean) return 1;
  std::int64_t count = 0;
  for (std::int64_t n = 0; n < net.rows; ++n) count += labels[n] != net.ignored;
  return static_cast<R>(1 / static_cast<double>(count));
}

// The loss's gradient by its argument, or by what a softmax makes the log probabilities of.
template <class R>
void loss_gradient(const Net& net, const Passed<R>& passed, R* d) {
  const std::int64_t features = net.layers[net.depth - 1].out, row = row_of<R>(features);
  if (net.loss == Loss::squared_error) {
    const R* target = static_cast<const R*>(passed.target);
    const R scale = static_cast<R>(net.mean ? 2 / static_cast<double>(net.rows * features) : 2);
    for (std::int64_t n = 0; n < net.rows; ++n)
      for (std::int64_t j = 0; j < features; ++j)
        d[n * row + j] = scale * (passed.out[n * features + j] - target[n * features + j]);
    return;
  }
  const auto* labels = static_cast<const std::int64_t*>(passed.target);
  const R scale = scale_of<R>(net, labels);
  for (std::int64_t n = 0; n < net.rows; ++n) {
    const bool counts = labels[n] != net.ignored;
    for (std::int64_t j = 0; j < features; j += width<R>) {
      Vector<R> logs{};
      const std::int64_t here = minimum(width<R>, features - j);
      __builtin_memcpy(&logs, passed.out + n * features + j, sizeof(R) * here);
      store(d + n * row + j, counts ? scale * exponential(logs) : Vector<R>{});
    }
    if (counts && labels[n] >= 0 && labels[n] < features) d[n * row + labels[n]] -= scale;
  }
}

// Its second derivative times `dot`, whose padding is zero.
template <class R>
void loss_second(const Net& net, const Passed<R>& passed, const R* dot, R* to) {
  const std::int64_t features = net.layers[net.depth - 1].out, row = row_of<R>(features);
  if (net.loss == Loss::squared_error) {
    const R scale = static_cast<R>(net.mean ? 2 / static_cast<double>(net.rows * features) : 2);
    for (std::int64_t i = 0; i < net.rows * row; i += width<R>) store(to + i, scale * load(dot + i));
    return;
  }
  const auto* labels = static_cast<const std::int64_t*>(passed.target);
  const R scale = scale_of<R>(net, labels);
  for (std::int64_t n = 0; n < net.rows; ++n) {
    R* out = to + n * row;
    Vector<R> sums{};
    for (std::int64_t j = 0; j < features; j += width<R>) {
      Vector<R> p{};
      const std::int64_t here = minimum(width<R>, features - j);
      __builtin_memcpy(&p, passed.out + n * features + j, sizeof(R) * here);
      p = exponential(p);
      store(out + j, p);
      sums += p * load(dot + n * row + j);
    }
    const R mean = sum<R>(sums), factor = labels[n] == net.ignored ? R(0) : scale;
    for (std::int64_t j = 0; j < features; j += width<R>)
      store(out + j, factor * load(out + j) * (load(dot + n * row + j) - mean));
  }
}

template <class R>
R absolute(R x) {
  return x < 0 ? -x : x;
}

// The products of a row with v, and of its elements' sizes.
template <class R>
void dots(const R* row, const R* v, std::int64_t n, R& product, R& size) {
  Vector<R> products[2] = {}, sizes{};
  std::int64_t i = 0;
  const auto add = [&](Vector<R>& to) {
    const Vector<R> term = load(row + i) * load(v + i);
    to += term;
    sizes += select<R>(term < 0, -term, term);
    i += width<R>;
  };
  while (i + 2 * width<R> <= n) {
    add(products[0]);
    add(products[1]);
  }
  while (i + width<R> <= n) add(products[0]);
  product = sum<R>(products[0] + products[1]);
  size = sum<R>(sizes);
  for (; i < n; ++i) {
    product += row[i] * v[i];
    size += absolute(row[i] * v[i]);
  }
}

// Whether G = d^T a, as far as a vector r tells (Freivalds): G r = d^T (a r). Products and sums of that size are known to
// `tolerance` of the largest.
template <class R>
bool agree(const R* g, const R* a, const R* d, std::int64_t rows, std::int64_t in, std::int64_t out, R* r, R* a_r) {
  constexpr R tolerance = sizeof(R) == sizeof(float) ? R(2e-4) : R(1e-10);
  const std::int64_t row = row_of<R>(out);
  R* a_size = a_r + rows;
  if (a == nullptr) {  // of a bias
    for (std::int64_t n = 0; n < rows; ++n) a_r[n] = a_size[n] = 1;
  } else {
    for (std::int64_t i = 0; i < in; ++i)
      r[i] = 1 + R(static_cast<std::uint32_t>(i) * 2654435761U >> 28) / 16;
    for (std::int64_t n = 0; n < rows; ++n) dots(a + n * in, r, in, a_r[n], a_size[n]);
  }
  R largest = 0, worst = 0;
  for (std::int64_t o = 0; o < out; ++o) {
    R given = g[o], unused = 0, found = 0, size = 0;
    if (a != nullptr) dots(g + o * in, r, in, given, unused);
    for (std::int64_t n = 0; n < rows; ++n) {
      found += d[n * row + o] * a_r[n];
      size += absolute(d[n * row + o]) * a_size[n];
    }
    largest = size > largest ? size : largest;
    const R error = absolute(given - found);
    if (!(error <= worst)) worst = error;  // NaN stays
  }
  return worst <= tolerance * largest;
}

template <class R>
bool descend(const Net& net, const Passed<R>& passed, const Parameters<const R>& gradients, R* ds, R* memory) {
  Pieces<R> pieces{memory};
  const Layer& end = net.layers[net.depth - 1];
  R* d = ds + kept<R>(net) - net.rows * row_of<R>(end.out);
  std::int64_t widest = 0;
  for (int l = 0; l < net.depth; ++l) widest = maximum(widest, net.layers[l].in);
  R *r = pieces.take(widest), *a_r = pieces.take(2 * net.rows);
  loss_gradient(net, passed, d);
  if (end.activation != Activation::identity)
    times_slope<R>(end.activation, pieces.rows(passed.last, net.rows, end.out), net.rows, end.out, d, d);
  for (int l = net.depth - 1; l >= 0; --l) {
    const Layer& layer = net.layers[l];
    if (!agree<R>(gradients[2 * l], passed.inputs[l], d, net.rows, layer.in, layer.out, r, a_r)) return false;
    if (layer.bias && !agree<R>(gradients[2 * l + 1], nullptr, d, net.rows, 1, layer.out, r, a_r)) return false;
    if (l == 0) return true;
    const Rows<R> w = pieces.rows(passed.weights[l], layer.out, layer.in);
    const Term<R> term{d, row_of<R>(layer.out), w.p, w.row, layer.out};
    d -= net.rows * row_of<R>(layer.in);
    product(&term, 1, net.rows, layer.in, {d, row_of<R>(layer.in)});
    const Activation before = net.layers[l - 1].activation;
    if (before != Activation::identity)
      times_slope<R>(before, pieces.rows(passed.inputs[l], net.rows, layer.in), net.rows, layer.in, d, d);
  }
  return true;
}

// The tangents of a layer's argument and result.
template <class R>
struct Tangents {
  R *z, *a;
};

template <class R>
Tangents<R> layer_tangent(const Net& net, const Passed<R>& passed, int l, const R* a_dot, const Rows<R>& result,
                          const Cotangents<R>& to, R* panel, Pieces<R>& pieces) {
  const Layer& layer = net.layers[l];
  const std::int64_t in = layer.in, row = row_of<R>(layer.out);
  const R *v = to.along[2 * l], *added = to.along[2 * l + 1];
  Tangents<R> t{pieces.take(net.rows * row), nullptr};
  R* base = pieces.take(layer.out);
  fill_zero(base, row);
  if (added != nullptr) __builtin_memcpy(base, added, sizeof(R) * layer.out);
  Term<R> terms[2];
  int count = 0;
  if (a_dot != nullptr) terms[count++] = {a_dot, row_of<R>(in), passed.weights[l], in, in, true};
  if (v != nullptr) terms[count++] = {passed.inputs[l], in, v, in, in, true};
  if (count > 0) {
    panel_product(terms, count, net.rows, layer.out, {t.z, row, base}, 1, panel);
  } else {
    for (std::int64_t n = 0; n < net.rows; ++n) __builtin_memcpy(t.z + n * row, base, sizeof(R) * row);
  }
  t.a = t.z;
  if (layer.activation == Activation::identity) return t;
  t.a = pieces.take(net.rows * row);
  times_slope<R>(layer.activation, result, net.rows, layer.out, t.z, t.a);
  return t;
}

// Results of a layer's weight and bias.
template <class R>
void layer_results(const Net& net, int l, const R* d, const R* d_dot, const Rows<R>& a, const R* a_dot, const Rows<R>& v,
                   const Cotangents<R>& to, R* scratch) {
  const Layer& layer = net.layers[l];
  const std::int64_t in = layer.in, out = layer.out, row = row_of<R>(out);
  const bool direct = in % width<R> == 0;
  Term<R> terms[2] = {{d_dot, row, a.p, a.row, net.rows}, {d, row, a_dot, row_of<R>(in), net.rows}};
  R* weight = to.results[2 * l];
  Result<R> result{direct ? weight : scratch, direct ? in : row_of<R>(in)};
  if (to.steps) {
    result.from = v.p;
    result.rate = to.rate;
  }
  turned_product(terms, a_dot == nullptr ? 1 : 2, out, in, result);
  for (std::int64_t o = 0; !direct && o < out; ++o)
    __builtin_memcpy(weight + o * in, scratch + o * result.row, sizeof(R) * in);
  if (!layer.bias) return;
  const R* along = to.along[2 * l + 1];
  for (std::int64_t o = 0; o < out; ++o) {
    R sum = 0;
    for (std::int64_t n = 0; n < net.rows; ++n) sum += d_dot[n * row + o];
    to.results[2 * l + 1][o] = to.steps ? (along == nullptr ? R(0) : along[o]) - to.rate * sum : sum;
  }
}

template <class R>
void pull_back(const Net& net, const Passed<R>& passed, const R* ds, const Cotangents<R>& to, R* memory) {
  Pieces<R> pieces{memory};
  Rows<R> values[max_layers + 1];  // inputs, and the last activation's result
  Tangents<R> tangents[max_layers];
  std::int64_t widest = 0;
  for (int l = 0; l < net.depth; ++l) {
    values[l] = pieces.rows(passed.inputs[l], net.rows, net.layers[l].in);
    widest = maximum(widest, maximum(row_of<R>(net.layers[l].in), row_of<R>(net.layers[l].out)));
  }
  if (passed.last != nullptr) values[net.depth] = pieces.rows(passed.last, net.rows, net.layers[net.depth - 1].out);
  R* panel = pieces.take(panel_size<R>);
  for (int l = 0; l < net.depth; ++l)
    tangents[l] = layer_tangent(net, passed, l, l == 0 ? nullptr : tangents[l - 1].a, values[l + 1], to, panel, pieces);

  R *d_dot = pieces.take(net.rows * widest), *next = pieces.take(net.rows * widest);
  const R* d = ds + kept<R>(net);
  loss_second(net, passed, tangents[net.depth - 1].a, d_dot);
  for (int l = net.depth - 1; l >= 0; --l) {
    const Layer& layer = net.layers[l];
    const std::int64_t in = layer.in, out = layer.out;
    d -= net.rows * row_of<R>(out);
    if (layer.activation != Activation::identity)
      times_slope<R>(layer.activation, values[l + 1], net.rows, out, d_dot, d_dot, tangents[l].z, d);
    const bool along = to.along[2 * l] != nullptr;
    Rows<R> v{nullptr, in % width<R> == 0 ? in : row_of<R>(in)};
    if (along) {
      v = pieces.rows(to.along[2 * l], out, in);
    } else if (to.steps) {
      R* zeros = pieces.take(out * v.row);
      fill_zero(zeros, out * v.row);
      v.p = zeros;
    }
    const R* a_dot = l == 0 ? nullptr : tangents[l - 1].a;
    layer_results(net, l, d, d_dot, values[l], a_dot, v, to, pieces.next);
    if (l == 0) return;
    const Rows<R> w = pieces.rows(passed.weights[l], out, in);
    const Term<R> terms[2] = {{d_dot, row_of<R>(out), w.p, w.row, out}, {d, row_of<R>(out), v.p, v.row, out}};
    product(terms, along ? 2 : 1, net.rows, in, {next, row_of<R>(in)});
    R* const done = d_dot;
    d_dot = next;
    next = done;
  }
}

template <class R>
constexpr Kernels<R> kernels{workspace<R>, descend<R>, pull_back<R>};

}  // namespace

extern const Table table{kernels<float>, kernels<double>};

}  // namespace fastmeta::perceptron::FASTMETA_ISA
