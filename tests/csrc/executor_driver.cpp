// Runs the native executor on small programs, for the sanitizers: every operation, both precisions, several threads and
// callers. The meta-gradient is checked along random directions by central differences of the meta-loss.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../csrc/executor/meta_gradient.h"
#include "executor_cases.h"

using namespace fastmeta;
using namespace fastmeta::executor;

namespace {

template <class R>
struct Problem {
  std::int64_t n[2] = {4, 6};
  std::vector<std::vector<R>> weights, gradients;
  std::vector<R> inputs[2], numbers[2], alpha{R(0.1), R(0.05), R(0.2)}, d_alpha{0, 0, 0};
  std::vector<R> losses, support_losses, outputs;
  std::vector<std::int64_t> labels[2], lists[2];  // the latter of rows that are kept, of two sequences each
  const Case& which;

  explicit Problem(const Case& c, unsigned seed) : which(c) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (const std::int64_t size : c.weights) {
      weights.emplace_back(size);
      gradients.emplace_back(size, std::nan(""));
      const bool constant = weights.size() > c.weights.size() - c.constants;
      const double spread = size > 1000 ? 0.03 : 0.5;  // sums of many terms stay where curves bend
      for (R& w : weights.back()) w = static_cast<R>(spread * normal(random));
      if (constant)  // half of them variances
        for (R& w : weights.back()) w = R(0.5) + std::abs(w);
    }
    gradients.resize(gradients.size() - c.constants);
    for (int s = 0; s < 2; ++s) {
      inputs[s].resize(tasks * n[s] * c.input);
      for (R& x : inputs[s]) x = static_cast<R>(normal(random));
      numbers[s].resize(tasks * n[s] * classes);
      for (R& x : numbers[s]) x = static_cast<R>(0.5 + 0.2 * normal(random));
      for (std::int64_t i = 0; i < tasks * n[s]; ++i)
        labels[s].push_back(static_cast<std::int64_t>(random() % classes));
      for (int t = 0; t < tasks; ++t) list_rows(n[s], random() % (n[s] / 2), lists[s]);
    }
    if (c.ignores) labels[0][1] = -100;
    losses.resize(tasks);
    support_losses.resize(tasks * steps);
    outputs.resize(tasks * n[1] * classes);
  }

  std::vector<Leaf> leaves(int s) const {
    const auto bytes = static_cast<std::int64_t>(sizeof(R));
    const Leaf input{reinterpret_cast<const char*>(inputs[s].data()), n[s] * which.input * bytes};
    const Leaf list{reinterpret_cast<const char*>(lists[s].data()), (3 + n[s]) * 8};
    if (which.labels) return {input, {reinterpret_cast<const char*>(labels[s].data()), n[s] * 8}, list};
    return {input, {reinterpret_cast<const char*>(numbers[s].data()), n[s] * classes * bytes}, list};
  }

  // All of n rows but those from `first` to the middle and the last one.
  static void list_rows(std::int64_t n, std::int64_t first, std::vector<std::int64_t>& list) {
    const std::int64_t before = first == 0 ? 1 : first, all = before + n / 2 - 1;
    list.insert(list.end(), {0, before, all});
    for (std::int64_t i = 0; i < all; ++i) list.push_back(i < before ? i : n / 2 + i - before);
    list.insert(list.end(), n - all, -1);
  }

  // Where rates are not learned, operations that can take their steps along with their gradients.
  double run(MetaGradient<R>& step, bool gradient, bool learned, int threads, Profile* profile = nullptr) {
    std::vector<const R*> parameters;
    std::vector<R*> results;
    for (const auto& w : weights) parameters.push_back(w.data());
    for (auto& g : gradients) results.push_back(g.data());
    R loss;
    const Request<R> request{tasks,           steps,         false,
                             alpha.data(),    true,          false,
                             parameters,      leaves(0),     leaves(1),
                             gradient,        nullptr,       gradient ? results : std::vector<R*>{},
                             learned ? d_alpha.data() : nullptr,
                             &loss,           losses.data(), support_losses.data(),
                             outputs.data(),  n[1],          classes,
                             threads,         profile};
    step.run(request);
    return static_cast<double>(loss);
  }
};

// Of some calls at the same time, on so many threads each at the most.
int check_profile(const Case& c, const Profile& profile, int calls, int threads) {
  double seconds = 0;
  bool right = profile.meta_steps() == calls;
  for (const bool query : {false, true}) {
    const Program program = c.program(4);
    const std::vector<Tally>& tallies = query ? profile.query() : profile.support();
    std::vector<bool> varies(program.values), active(program.values);  // by value, as its maker
    for (std::size_t i = 0; i < tallies.size(); ++i) {
      const Operation& operation = program.operations[i / map_count];
      const int y = operation.y, map = static_cast<int>(i % map_count);
      for (const int w : operation.w) {
        varies[y] = varies[y] || (w != absent && w < program.adapted);
        active[y] = active[y] || (w != absent && w < program.differentiated);
      }
      for (const Source& x : operation.x) {
        if (x.is_data || x.index == absent) continue;
        varies[y] = varies[y] || varies[x.index];
        active[y] = active[y] || active[x.index];
      }
      // What does not vary runs once on a support set: forward, and back for all steps.
      const std::int64_t passes = query || !varies[y] ? 1 : steps;
      const bool runs = map == forward_map || (map == backward_map && active[y]) || (!query && varies[y]);
      right = right && tallies[i].calls == (runs ? calls * tasks * passes : 0) && tallies[i].ticks >= 0;
      seconds += profile.seconds(tallies[i]);
    }
  }
  right = right && seconds > 0 && seconds <= threads * profile.seconds();
  if (!right) std::printf("%s: a profile of %g s of threads in %g s\n", c.name, seconds, profile.seconds());
  return right ? 0 : 1;
}

// The meta-loss's derivative by weights and rates along a direction, d_alpha where `learned`.
template <class R>
struct Direction {
  std::vector<std::vector<double>> weights;
  std::vector<double> rates;

  Direction(const Problem<R>& problem, bool learned) {
    std::mt19937 random(2);
    std::normal_distribution<double> normal;
    for (const auto& g : problem.gradients) {
      weights.emplace_back(g.size());
      for (double& x : weights.back()) x = normal(random);
    }
    for (std::int64_t k = 0; k < steps; ++k) rates.push_back(learned ? k + 1.0 : 0);
  }

  // The gradient along it, and the sum of the gradient's absolute entries.
  std::pair<double, double> along(const Problem<R>& problem) const {
    double slope = 0, size = 0;
    for (std::size_t p = 0; p < weights.size(); ++p)
      for (std::size_t i = 0; i < weights[p].size(); ++i) {
        const auto g = static_cast<double>(problem.gradients[p][i]);
        slope += g * weights[p][i];
        size += std::abs(g);
      }
    for (std::int64_t k = 0; k < steps; ++k) slope += rates[k] * static_cast<double>(problem.d_alpha[k]);
    return {slope, size};
  }

  // By central differences of the meta-loss, always in double.
  double differences(const Case& c) const {
    MetaGradient<double> exact(c.program(4), c.program(6), isa_in_use());
    double ends[2];
    const double h = 5e-6;
    for (int end = 0; end < 2; ++end) {
      Problem<double> here(c, 1);
      const double move = end == 0 ? -h : h;
      for (std::size_t p = 0; p < weights.size(); ++p)
        for (std::size_t i = 0; i < weights[p].size(); ++i) here.weights[p][i] += move * weights[p][i];
      for (std::int64_t k = 0; k < steps; ++k) here.alpha[k] += move * rates[k];
      ends[end] = here.run(exact, false, false, 1);
    }
    return (ends[1] - ends[0]) / (2 * h);
  }
};

template <class R>
int check(const Case& c, bool learned, double tolerance) {
  MetaGradient<R> step(c.program(4), c.program(6), isa_in_use());
  Problem<R> problem(c, 1);
  problem.run(step, true, learned, 3);

  const Direction<R> direction(problem, learned);
  const auto [slope, size] = direction.along(problem);
  const double found = direction.differences(c), error = std::abs(found - slope) / (size + 1e-3);
  std::printf("%-22s %s, %s rates: %.9g along a direction, differences %.9g, off by %.1e of the gradient's size\n",
              c.name, sizeof(R) == 4 ? "float " : "double", learned ? "learned" : "given  ", slope, found, error);
  if (!(error <= tolerance)) return 1;

  // The same bits with another number of threads, also within a task, and from several callers at once.
  const Sharing within = step.sharing(tasks, {steps, true, learned, false}, tasks + 2);
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
    callers.emplace_back(
        [&, i] { others[i]->run(step, true, learned, threads[i], i == 0 ? nullptr : profile.get()); });
  for (std::thread& caller : callers) caller.join();
  others.push_back(std::make_unique<Problem<R>>(c, 1));
  others.back()->run(step, true, learned, tasks + 2);
  for (const auto& other : others)
    if (other->gradients != problem.gradients || other->d_alpha != problem.d_alpha) {
      std::printf("%s: other bits from other threads\n", c.name);
      return 1;
    }

  // A workspace that the other kind of call leaves behind serves as well.
  Problem<R> after(c, 1);
  if (c.learns) Problem<R>(c, 1).run(step, true, !learned, 1);
  after.run(step, true, learned, 1);
  if (after.gradients != problem.gradients || after.d_alpha != problem.d_alpha) {
    std::printf("%s: other bits after another kind of call\n", c.name);
    return 1;
  }
  return check_profile(c, *profile, 3, tasks + 2);
}

enum class Wrong { backward, tangent, tangent_backward };

template <class R>
Maps<R> sound(Isa isa) {
  if constexpr (std::is_same_v<R, float>)
    return linear_block::table_of(isa).f32;
  else
    return linear_block::table_of(isa).f64;
}

// A linear layer's maps, of which one gives too much in one place.
template <class R, Wrong wrong>
Maps<R> spoiled(Isa isa) {
  Maps<R> maps = sound<R>(isa);
  if constexpr (wrong == Wrong::backward)
    maps.backward = [](const void* shape, const Primal<R>& p, R* scratch) {
      sound<R>(isa_in_use()).backward(shape, p, scratch);
      p.dx[0][0] *= R(1.1);
    };
  if constexpr (wrong == Wrong::tangent)
    maps.tangent = [](const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
      sound<R>(isa_in_use()).tangent(shape, p, t, scratch);
      t.y_dot[0] *= R(3);
    };
  if constexpr (wrong == Wrong::tangent_backward)
    maps.tangent_backward = [](const void* shape, const Primal<R>& p, const Tangent<R>& t, R* scratch) {
      sound<R>(isa_in_use()).tangent_backward(shape, p, t, scratch);
      t.dx_dot[0][0] *= R(1.1);
    };
  return maps;
}

template <Wrong wrong>
Program spoiled_rows(std::int64_t n) {
  Program p = rows(n, loss::Kind::cross_entropy);
  p.operations[1].f32 = spoiled<float, wrong>;
  p.operations[1].f64 = spoiled<double, wrong>;
  return p;
}

const Case spoiled_cases[] = {
    {"wrong backward", spoiled_rows<Wrong::backward>, row_weights, features, true},
    {"wrong tangent", spoiled_rows<Wrong::tangent>, row_weights, features, true},
    {"wrong tangent backward", spoiled_rows<Wrong::tangent_backward>, row_weights, features, true},
};

}  // namespace

int main() {
  int failures = 0;
  for (const Case& c : cases)
    for (const bool learned : {true, false})
      if (c.learns || !learned) failures += check<double>(c, learned, 1e-8) + check<float>(c, learned, 1e-5);
  for (const Case& c : spoiled_cases)
    for (const bool learned : {true, false})
      if (check<double>(c, learned, 1e-8) + check<float>(c, learned, 1e-5) != 2) {
        std::printf("%s: not noticed\n", c.name);
        ++failures;
      }
  std::printf("%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
