// Checks a perceptron's gradient and its pull-back against plain loops, whose gradient is differenced, on random shapes.
//
// Arguments: [networks] [seed].
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../../csrc/perceptron/kernels.h"

#ifndef FASTMETA_ISA
#define FASTMETA_ISA plain
#endif

namespace {

using namespace fastmeta;
using namespace fastmeta::perceptron;
using Numbers = std::vector<double>;

struct Problem {
  std::vector<Layer> layers;
  Net net;
  Numbers x, target;
  std::vector<std::int64_t> labels;
  std::vector<Numbers> parameters;  // weight and bias of each layer; empty where there is none
};

// What a forward and a backward pass leave.
struct Sweep {
  std::vector<Numbers> inputs, gradients;
  Numbers last, out;  // the last activation's result; what the loss compares, or log probabilities
};

double value(Activation f, double z) {
  if (f == Activation::relu) return z > 0 ? z : 0;
  if (f == Activation::tanh) return std::tanh(z);
  if (f == Activation::sigmoid) return 1 / (1 + std::exp(-z));
  return z;
}

double slope(Activation f, double y) {
  if (f == Activation::relu) return y > 0 ? 1 : 0;
  if (f == Activation::tanh) return 1 - y * y;
  if (f == Activation::sigmoid) return y * (1 - y);
  return 1;
}

Sweep sweep(const Problem& p, const std::vector<Numbers>& parameters) {
  Sweep s;
  s.gradients.resize(parameters.size());
  const std::int64_t rows = p.net.rows, columns = p.layers.back().out;
  Numbers a = p.x;
  for (int l = 0; l < p.net.depth; ++l) {
    const Layer& layer = p.layers[l];
    s.inputs.push_back(a);
    Numbers z(rows * layer.out);
    for (std::int64_t n = 0; n < rows; ++n)
      for (std::int64_t o = 0; o < layer.out; ++o) {
        double sum = layer.bias ? parameters[2 * l + 1][o] : 0;
        for (std::int64_t i = 0; i < layer.in; ++i) sum += a[n * layer.in + i] * parameters[2 * l][o * layer.in + i];
        z[n * layer.out + o] = value(layer.activation, sum);
      }
    a = z;
  }
  s.last = s.out = a;
  Numbers d(a.size());
  std::int64_t count = 0;
  for (const std::int64_t label : p.labels) count += label != p.net.ignored;
  for (std::int64_t n = 0; n < rows; ++n) {
    if (p.net.loss == Loss::squared_error) {
      for (std::int64_t j = n * columns; j < (n + 1) * columns; ++j)
        d[j] = 2 * (a[j] - p.target[j]) / (p.net.mean ? static_cast<double>(a.size()) : 1);
      continue;
    }
    double sum = 0;
    for (std::int64_t j = 0; j < columns; ++j) sum += std::exp(a[n * columns + j]);
    for (std::int64_t j = 0; j < columns; ++j) {
      s.out[n * columns + j] = a[n * columns + j] - std::log(sum);
      if (p.labels[n] == p.net.ignored) continue;
      const double q = std::exp(s.out[n * columns + j]) - (j == p.labels[n] ? 1 : 0);
      d[n * columns + j] = q / (p.net.mean ? static_cast<double>(count) : 1);
    }
  }
  for (int l = p.net.depth - 1; l >= 0; --l) {
    const Layer& layer = p.layers[l];
    const Numbers& y = l + 1 < p.net.depth ? s.inputs[l + 1] : s.last;
    for (std::size_t i = 0; i < d.size(); ++i) d[i] *= slope(layer.activation, y[i]);
    Numbers &dw = s.gradients[2 * l], &db = s.gradients[2 * l + 1], before(rows * layer.in);
    dw.assign(layer.in * layer.out, 0);
    db.assign(layer.bias ? layer.out : 0, 0);
    for (std::int64_t n = 0; n < rows; ++n)
      for (std::int64_t o = 0; o < layer.out; ++o) {
        const double e = d[n * layer.out + o];
        if (layer.bias) db[o] += e;
        for (std::int64_t i = 0; i < layer.in; ++i) {
          dw[o * layer.in + i] += e * s.inputs[l][n * layer.in + i];
          before[n * layer.in + i] += e * parameters[2 * l][o * layer.in + i];
        }
      }
    d = before;
  }
  return s;
}

// Exactly as much memory as there are numbers.
template <class R>
std::unique_ptr<R[]> copy_of(const Numbers& numbers) {
  std::unique_ptr<R[]> copy(new R[numbers.size()]);
  std::copy(numbers.begin(), numbers.end(), copy.get());
  return copy;
}

int failures = 0;

void expect(bool holds, const char* what, const Problem& p) {
  if (holds) return;
  ++failures;
  std::printf("%s: rows %ld, loss %d, mean %d, layers", what, static_cast<long>(p.net.rows), int(p.net.loss),
              int(p.net.mean));
  for (const Layer& l : p.layers)
    std::printf(" %ld-%ld(%d,%d)", static_cast<long>(l.in), static_cast<long>(l.out), int(l.bias), int(l.activation));
  std::printf("\n");
}

template <class R>
void check(const Problem& p, std::mt19937& random, const Kernels<R>& kernels, double tolerance) {
  std::normal_distribution<double> normal;
  const Sweep at = sweep(p, p.parameters);
  std::vector<std::unique_ptr<R[]>> held;
  const auto hold = [&](const Numbers& numbers) {
    held.push_back(copy_of<R>(numbers));
    return held.back().get();
  };
  Passed<R> passed{};
  Parameters<const R> gradients{};
  Cotangents<R> to{};
  to.steps = random() % 2 == 0;
  to.rate = R(0.25);
  std::vector<Numbers> along(p.parameters.size());
  for (int l = 0; l < p.net.depth; ++l) {
    passed.inputs[l] = hold(at.inputs[l]);
    passed.weights[l] = hold(p.parameters[2 * l]);
  }
  for (std::size_t i = 0; i < along.size(); ++i) {
    const std::size_t size = p.parameters[i].size();
    along[i].assign(size, 0);
    if (size == 0) continue;
    gradients[i] = hold(at.gradients[i]);
    to.results[i] = hold(Numbers(size, std::numeric_limits<double>::quiet_NaN()));
    if (random() % 4 == 0) continue;
    for (double& v : along[i]) v = normal(random);
    to.along[i] = hold(along[i]);
  }
  passed.last = p.layers.back().activation == Activation::identity ? nullptr : hold(at.last);
  passed.out = hold(at.out);
  passed.target = p.net.loss == Loss::squared_error ? static_cast<const void*>(hold(p.target)) : p.labels.data();

  std::unique_ptr<R[]> ds(new R[kept<R>(p.net)]), workspace(new R[kernels.workspace(p.net)]);
  const R poison = std::numeric_limits<R>::quiet_NaN();
  std::fill_n(ds.get(), kept<R>(p.net), poison);
  std::fill_n(workspace.get(), kernels.workspace(p.net), poison);
  expect(kernels.descend(p.net, passed, gradients, ds.get(), workspace.get()), "the gradient was refused", p);
  std::fill_n(workspace.get(), kernels.workspace(p.net), poison);
  kernels.pull_back(p.net, passed, ds.get(), to, workspace.get());

  constexpr double step = 1e-6;
  std::vector<Numbers> up = p.parameters, down = p.parameters;
  for (std::size_t i = 0; i < up.size(); ++i)
    for (std::size_t j = 0; j < up[i].size(); ++j) {
      up[i][j] += step * along[i][j];
      down[i][j] -= step * along[i][j];
    }
  const std::vector<Numbers> above = sweep(p, up).gradients, below = sweep(p, down).gradients;
  double largest = 1, worst = 0;
  for (std::size_t i = 0; i < up.size(); ++i)
    for (std::size_t j = 0; j < up[i].size(); ++j) {
      const double product = (above[i][j] - below[i][j]) / (2 * step);
      const double wanted = to.steps ? along[i][j] - 0.25 * product : product;
      const double error = std::fabs(wanted - static_cast<double>(to.results[i][j]));
      largest = std::max(largest, std::fabs(wanted));
      if (!(error <= worst)) worst = error;
    }
  expect(worst <= tolerance * largest, "the pull-back is wrong", p);

  // A gradient that something changed.
  const int l = static_cast<int>(random() % p.layers.size());
  R* changed = const_cast<R*>(gradients[2 * l]);
  const Numbers& g = at.gradients[2 * l];
  double size = 0;
  for (const double e : g) size = std::max(size, std::fabs(e));
  for (std::size_t j = 0; j < g.size(); ++j) changed[j] *= 2;
  expect(size < 1e-3 || !kernels.descend(p.net, passed, gradients, ds.get(), workspace.get()),
         "another gradient was taken", p);
}

Problem problem(std::mt19937& random) {
  const auto one_of = [&](std::initializer_list<std::int64_t> of) { return of.begin()[random() % of.size()]; };
  std::normal_distribution<double> normal;
  Problem p;
  const int depth = static_cast<int>(one_of({1, 2, 3, 4}));
  std::int64_t in = one_of({1, 3, 8, 17, 40, 400});
  for (int l = 0; l < depth; ++l) {
    const std::int64_t out = one_of({1, 2, 5, 8, 16, 23, 40});
    const Activation activations[] = {Activation::identity, Activation::relu, Activation::tanh, Activation::sigmoid};
    p.layers.push_back({in, out, random() % 3 != 0, activations[random() % 4]});
    in = out;
  }
  // Of one class there is no gradient, but for roundings.
  const Loss loss = in == 1 || random() % 2 ? Loss::squared_error : Loss::cross_entropy;
  p.net = {p.layers.data(), depth, one_of({1, 2, 5, 10, 19}), loss, random() % 2 == 0, -100};
  const auto fill = [&](std::int64_t n, double scale) {
    Numbers numbers(n);
    for (double& x : numbers) x = scale * normal(random);
    return numbers;
  };
  p.x = fill(p.net.rows * p.layers[0].in, 1);
  p.target = fill(p.net.rows * in, 1);
  for (std::int64_t n = 0; n < p.net.rows; ++n)
    p.labels.push_back(n > 0 && random() % 5 == 0 ? -100 : static_cast<std::int64_t>(random() % in));
  for (const Layer& l : p.layers) {
    p.parameters.push_back(fill(l.in * l.out, 1 / std::sqrt(static_cast<double>(l.in))));
    p.parameters.push_back(fill(l.bias ? l.out : 0, 0.5));
  }
  return p;
}

}  // namespace

int main(int argc, char** argv) {
  const int networks = argc > 1 ? std::atoi(argv[1]) : 200;
  std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 0);
  for (int i = 0; i < networks; ++i) {
    const Problem p = problem(random);
    check<double>(p, random, FASTMETA_ISA::table.f64, 1e-6);
    check<float>(p, random, FASTMETA_ISA::table.f32, 1e-4);
  }
  std::printf("%d networks, %d failures\n", networks, failures);
  return failures == 0 ? 0 : 1;
}
