// Runs the native executor on small programs, for the sanitizers: every operation, both precisions, several threads and
// callers. The meta-gradient is checked along random directions by central differences of the meta-loss.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/conv_block/kernels.h"
#include "../../csrc/data/kernels.h"
#include "../../csrc/executor/meta_gradient.h"
#include "../../csrc/flatten/kernels.h"
#include "../../csrc/linear_block/kernels.h"
#include "../../csrc/loss/kernels.h"
#include "../../csrc/norm/kernels.h"
#include "../../csrc/pointwise/kernels.h"
#include "../../csrc/pool/kernels.h"

using namespace fastmeta;
using namespace fastmeta::executor;

namespace {

#define FASTMETA_MAPS(operation, space)                                      \
  operation.f32 = [](Isa isa) { return space::table_of(isa).f32; };          \
  operation.f64 = [](Isa isa) { return space::table_of(isa).f64; };

constexpr int tasks = 7;
constexpr std::int64_t steps = 3, features = 5, hidden = 19, classes = 3, side = 9;

Operation linear(std::int64_t n, std::int64_t in, std::int64_t out, Activation activation, Source x, int w, int y) {
  Operation operation;
  auto shape = std::make_shared<linear_block::Shape>();
  *shape = {n, in, out, activation, 0.1, true, x.is_data};
  operation.shape = shape;
  FASTMETA_MAPS(operation, linear_block)
  operation.x[0] = x;
  operation.w[0] = w;
  operation.w[1] = w + 1;
  operation.y = y;
  return operation;
}

Operation loss_of(loss::Kind kind, std::int64_t n, int x, int y) {
  Operation operation;
  auto shape = std::make_shared<loss::Shape>();
  *shape = {kind, n, classes, true, -100};
  operation.shape = shape;
  FASTMETA_MAPS(operation, loss)
  operation.x[0] = {false, x};
  operation.target = 1;
  operation.y = y;
  if (kind == loss::Kind::cross_entropy) {
    operation.classes = classes;
    operation.label_rows = n;
    operation.ignored = -100;
  }
  return operation;
}

Operation conv(std::int64_t n, std::int64_t in, std::int64_t size, std::int64_t out, Source x, int w, int y) {
  Operation operation;
  auto shape = std::make_shared<conv_block::Shape>();
  *shape = {n, in, size, size, out, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, {2, 2}, {2, 2}, {0, 0}, 1e-5, 0.1,
            conv_block::Norm::batch, Activation::tanh, conv_block::Pool::average, true, true, x.is_data};
  operation.shape = shape;
  FASTMETA_MAPS(operation, conv_block)
  operation.x[0] = x;
  for (int i = 0; i < 4; ++i) operation.w[i] = w + i;
  operation.y = y;
  return operation;
}

Operation flat(std::int64_t n, std::int64_t channels, std::int64_t pixels, int x, int y) {
  Operation operation;
  auto shape = std::make_shared<flatten::Shape>();
  *shape = {n, channels, pixels};
  operation.shape = shape;
  FASTMETA_MAPS(operation, flatten)
  operation.x[0] = {false, x};
  operation.y = y;
  return operation;
}

Operation data_of(std::int64_t n, std::int64_t channels, std::int64_t pixels, int y) {
  Operation operation;
  auto shape = std::make_shared<data::Shape>();
  *shape = {n, channels, pixels};
  operation.shape = shape;
  FASTMETA_MAPS(operation, data)
  operation.x[0] = {true, 0};
  operation.y = y;
  return operation;
}

Operation sum(std::int64_t rows, std::int64_t channels, Activation activation, int a, int b, int y) {
  Operation operation;
  auto shape = std::make_shared<pointwise::Shape>();
  *shape = {rows, channels, {1, -0.7}, activation, 0.1};
  operation.shape = shape;
  FASTMETA_MAPS(operation, pointwise)
  operation.x[0] = {false, a};
  operation.x[1] = {false, b};
  operation.y = y;
  return operation;
}

Operation norm_of(norm::Shape given, int x, int w, int y) {
  Operation operation;
  given.eps = 1e-5;
  given.slope = 0.1;
  given.weight = given.bias = w != absent;
  auto shape = std::make_shared<norm::Shape>(given);
  operation.shape = shape;
  FASTMETA_MAPS(operation, norm)
  operation.x[0] = {false, x};
  if (w != absent) operation.w[0] = w;
  if (w != absent) operation.w[1] = w + 1;
  operation.y = y;
  return operation;
}

Operation pool_of(std::int64_t n, std::int64_t channels, std::int64_t size, conv_block::Pool kind, std::int64_t window,
                  int x, int y) {
  Operation operation;
  auto shape = std::make_shared<pool::Shape>();
  *shape = {n, channels, size, size, channels, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1, {window, window}, {2, 2}, {0, 0}, 0.0,
            0.0, conv_block::Norm::none, Activation::identity, kind, false, false, false};
  operation.shape = shape;
  FASTMETA_MAPS(operation, pool)
  operation.x[0] = {false, x};
  operation.y = y;
  return operation;
}

struct Case {
  const char* name;
  Program (*program)(std::int64_t n);
  std::vector<std::int64_t> weights;  // elements of each parameter
  std::int64_t input;                 // elements of a sample
  bool labels;
};

Program rows(std::int64_t n, loss::Kind kind) {
  Program p;
  p.operations = {linear(n, features, hidden, Activation::silu, {true, 0}, 0, 0),
                  linear(n, hidden, hidden, Activation::tanh, {false, 0}, 2, 1),
                  linear(n, hidden, classes, Activation::identity, {false, 1}, 4, 2), loss_of(kind, n, 2, 3)};
  p.values = 4;
  p.output = 2;
  p.adapted = p.differentiated = p.parameters = 6;
  return p;
}

Program images(std::int64_t n) {
  Program p;
  p.operations = {conv(n, 2, side, 6, {true, 0}, 0, 0), conv(n, 6, side / 2, 5, {false, 0}, 4, 1),
                  flat(n, 5, 4, 1, 2), linear(n, 20, classes, Activation::identity, {false, 2}, 8, 3),
                  loss_of(loss::Kind::cross_entropy, n, 3, 4)};
  p.values = 5;
  p.output = 3;
  p.adapted = p.differentiated = p.parameters = 10;
  return p;
}

// Layer norm before and group norm after, data and values that are read twice, a value added to itself.
Program residual_rows(std::int64_t n) {
  Program p;
  p.operations = {linear(n, features, hidden, Activation::identity, {true, 0}, 0, 0),
                  norm_of({n, 1, hidden, 1, 0, Activation::gelu, 0, false, false}, 0, 2, 1),
                  linear(n, hidden, hidden, Activation::silu, {false, 1}, 4, 2),
                  sum(n, hidden, Activation::sigmoid, 0, 2, 3),
                  norm_of({1, n, hidden, hidden, 0, Activation::identity, 0, false, false}, 3, absent, 4),
                  sum(n, hidden, Activation::identity, 4, 4, 5),
                  linear(n, hidden, features, Activation::tanh, {false, 5}, 6, 6),
                  data_of(n, features, 1, 7),
                  sum(n, features, Activation::tanh, 6, 7, 8),
                  linear(n, features, classes, Activation::identity, {false, 8}, 8, 9),
                  loss_of(loss::Kind::cross_entropy, n, 9, 10)};
  p.values = 11;
  p.output = 9;
  p.adapted = p.differentiated = p.parameters = 10;
  return p;
}

// A block of two channels a group beside a skip from the images, and pools of values.
Program residual_images(std::int64_t n) {
  Program p;
  const std::int64_t half = side / 2, pixels = half * half;
  p.operations = {conv(n, 2, side, 6, {true, 0}, 0, 0),
                  norm_of({n, pixels, 6, 3, 0, Activation::silu, 0, false, false}, 0, 4, 1),
                  data_of(n, 2, side * side, 2),
                  conv(n, 2, side, 6, {false, 2}, 6, 3),
                  sum(n * pixels, 6, Activation::leaky_relu, 1, 3, 4),
                  sum(n * pixels, 6, Activation::identity, 4, 1, 5),
                  pool_of(n, 6, half, conv_block::Pool::max, 2, 5, 6),
                  pool_of(n, 6, half, conv_block::Pool::average, 3, 4, 7),
                  norm_of({n, 1, 6, 1, 0, Activation::tanh, 0, false, false}, 7, 10, 8),
                  flat(n, 6, 4, 6, 9),
                  linear(n, 24, 6, Activation::identity, {false, 9}, 12, 10),
                  sum(n, 6, Activation::tanh, 10, 8, 11),
                  linear(n, 6, classes, Activation::identity, {false, 11}, 14, 12),
                  loss_of(loss::Kind::cross_entropy, n, 12, 13)};
  p.values = 14;
  p.output = 12;
  p.adapted = p.differentiated = p.parameters = 16;
  return p;
}

const std::vector<std::int64_t> row_weights{features * hidden, hidden, hidden * hidden, hidden, hidden * classes, classes};

const Case cases[] = {
    {"cross entropy", [](std::int64_t n) { return rows(n, loss::Kind::cross_entropy); }, row_weights, features, true},
    {"squared error", [](std::int64_t n) { return rows(n, loss::Kind::squared_error); }, row_weights, features, false},
    {"binary cross entropy", [](std::int64_t n) { return rows(n, loss::Kind::binary_cross_entropy); }, row_weights,
     features, false},
    {"residual rows", residual_rows,
     {features * hidden, hidden, hidden, hidden, hidden * hidden, hidden, hidden * features, features,
      features * classes, classes},
     features, true},
    {"residual images", residual_images,
     {108, 6, 6, 6, 6, 6, 108, 6, 6, 6, 6, 6, 144, 6, 18, 3}, 2 * side * side, true},
    {"convolutions", images, {108, 6, 6, 6, 270, 5, 5, 5, 60, 3}, 2 * side * side, true},
};

template <class R>
struct Problem {
  std::int64_t n[2] = {4, 6};
  std::vector<std::vector<R>> weights, gradients;
  std::vector<R> inputs[2], numbers[2], alpha{R(0.1), R(0.05), R(0.2)}, d_alpha{0, 0, 0}, losses, support_losses, outputs;
  std::vector<std::int64_t> labels[2];
  const Case& which;

  explicit Problem(const Case& c, unsigned seed) : which(c) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (const std::int64_t size : c.weights) {
      weights.emplace_back(size);
      gradients.emplace_back(size, std::nan(""));
      for (R& w : weights.back()) w = static_cast<R>(0.5 * normal(random));
    }
    for (int s = 0; s < 2; ++s) {
      inputs[s].resize(tasks * n[s] * c.input);
      for (R& x : inputs[s]) x = static_cast<R>(normal(random));
      numbers[s].resize(tasks * n[s] * classes);
      for (R& x : numbers[s]) x = static_cast<R>(0.5 + 0.2 * normal(random));
      for (std::int64_t i = 0; i < tasks * n[s]; ++i) labels[s].push_back(static_cast<std::int64_t>(random() % classes));
    }
    labels[0][1] = -100;
    losses.resize(tasks);
    support_losses.resize(tasks * steps);
    outputs.resize(tasks * n[1] * classes);
  }

  std::vector<Leaf> leaves(int s) const {
    const auto bytes = static_cast<std::int64_t>(sizeof(R));
    const Leaf input{reinterpret_cast<const char*>(inputs[s].data()), n[s] * which.input * bytes};
    if (which.labels) return {input, {reinterpret_cast<const char*>(labels[s].data()), n[s] * 8}};
    return {input, {reinterpret_cast<const char*>(numbers[s].data()), n[s] * classes * bytes}};
  }

  double run(MetaGradient<R>& step, bool gradient, int threads, Profile* profile = nullptr) {
    std::vector<const R*> parameters;
    std::vector<R*> results;
    for (const auto& w : weights) parameters.push_back(w.data());
    for (auto& g : gradients) results.push_back(g.data());
    R loss;
    const Request<R> request{tasks,           steps,         false,
                             alpha.data(),    true,          false,
                             parameters,      leaves(0),     leaves(1),
                             gradient,        nullptr,       gradient ? results : std::vector<R*>{},
                             gradient ? d_alpha.data() : nullptr,
                             &loss,           losses.data(), support_losses.data(),
                             outputs.data(),  n[1],          classes,
                             threads,         profile};
    step.run(request);
    return static_cast<double>(loss);
  }
};

// Of some calls at the same time, on so many threads each at the most. Data have no derivative; all else varies here.
int check_profile(const Case& c, const Profile& profile, int calls, int threads) {
  double seconds = 0;
  bool right = profile.meta_steps() == calls;
  for (const bool query : {false, true}) {
    const Program program = c.program(4);
    const std::vector<Tally>& tallies = query ? profile.query() : profile.support();
    for (std::size_t i = 0; i < tallies.size(); ++i) {
      const Operation& operation = program.operations[i / map_count];
      const bool constant = operation.x[0].is_data && operation.w[0] == absent;
      const bool runs = i % map_count == forward_map || (!constant && (!query || i % map_count == backward_map));
      right = right && tallies[i].calls == (runs ? calls * tasks * (query ? 1 : steps) : 0) && tallies[i].ticks >= 0;
      seconds += profile.seconds(tallies[i]);
    }
  }
  right = right && seconds > 0 && seconds <= threads * profile.seconds();
  if (!right) std::printf("%s: a profile of %g s of threads in %g s\n", c.name, seconds, profile.seconds());
  return right ? 0 : 1;
}

template <class R>
int check(const Case& c, double tolerance) {
  MetaGradient<R> step(c.program(4), c.program(6), isa_in_use());
  Problem<R> problem(c, 1);
  problem.run(step, true, 3);
  const auto gradients = problem.gradients;
  const auto d_alpha = problem.d_alpha;

  // The truth along a direction, always in double.
  MetaGradient<double> exact(c.program(4), c.program(6), isa_in_use());
  Problem<double> moved(c, 1);
  std::mt19937 random(2);
  std::normal_distribution<double> normal;
  std::vector<std::vector<double>> direction;
  double slope = 0, size = 0;
  for (std::size_t p = 0; p < gradients.size(); ++p) {
    direction.emplace_back();
    for (const R g : gradients[p]) {
      direction.back().push_back(normal(random));
      slope += static_cast<double>(g) * direction.back().back();
      size += std::abs(static_cast<double>(g));
    }
  }
  for (std::size_t k = 0; k < d_alpha.size(); ++k) slope += static_cast<double>(d_alpha[k]) * (k + 1.0);
  double ends[2];
  const double h = 5e-6;
  for (int side_of = 0; side_of < 2; ++side_of) {
    Problem<double> here(c, 1);
    const double move = side_of == 0 ? -h : h;
    for (std::size_t p = 0; p < direction.size(); ++p)
      for (std::size_t i = 0; i < direction[p].size(); ++i) here.weights[p][i] += move * direction[p][i];
    for (std::size_t k = 0; k < d_alpha.size(); ++k) here.alpha[k] += move * (k + 1.0);
    ends[side_of] = here.run(exact, false, 1);
  }
  const double found = (ends[1] - ends[0]) / (2 * h), error = std::abs(found - slope) / (size + 1e-3);
  std::printf("%-22s %s: %.9g along a direction, differences %.9g, off by %.1e of the gradient's size\n", c.name,
              sizeof(R) == 4 ? "float " : "double", slope, found, error);
  if (!(error <= tolerance)) return 1;

  // The same bits with another number of threads, also within a task, and from several callers at once.
  const Sharing within = step.sharing(tasks, {steps, true, true, false}, tasks + 2);
  if (c.program == images && (within.at_once != 1 || within.within != tasks + 2)) {
    std::printf("%s: %d threads within a task\n", c.name, within.within);
    return 1;
  }
  const int threads[] = {1, 2, 3, tasks + 2};
  std::vector<std::unique_ptr<Problem<R>>> others;
  for (int i = 0; i < 4; ++i) others.push_back(std::make_unique<Problem<R>>(c, 1));
  std::vector<std::thread> callers;
  const std::unique_ptr<Profile> profile = step.profile();
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&, i] { others[i]->run(step, true, threads[i], i == 0 ? nullptr : profile.get()); });
  for (std::thread& caller : callers) caller.join();
  others.push_back(std::make_unique<Problem<R>>(c, 1));
  others.back()->run(step, true, tasks + 2);
  for (const auto& other : others)
    if (other->gradients != gradients || other->d_alpha != d_alpha) {
      std::printf("%s: other bits from other threads\n", c.name);
      return 1;
    }
  return check_profile(c, *profile, 3, tasks + 2);
}

}  // namespace

int main() {
  int failures = 0;
  for (const Case& c : cases) failures += check<double>(c, 1e-8) + check<float>(c, 1e-5);
  std::printf("%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
