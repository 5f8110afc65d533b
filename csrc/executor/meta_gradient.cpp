#include "meta_gradient.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>

#include "../common/threads.h"
#include "block_sums.h"
#include "turns.h"

namespace fastmeta::executor {
namespace {

// Weights from which on sums of tasks would fill memory.
constexpr std::int64_t large_sums = std::int64_t{4} << 20;

std::int64_t processors() {
  static const std::int64_t number = std::max(1U, std::thread::hardware_concurrency());  // reads files to find out
  return number;
}

// More blocks are shared out more evenly, powers of two among most numbers of threads.
std::int64_t blocks_of(std::int64_t tasks, std::int64_t bytes) {
  const std::int64_t fitting = large_sums / std::max<std::int64_t>(1, bytes);
  const std::int64_t most = std::min(std::clamp<std::int64_t>(tasks / 2, 16, 32), fitting);
  std::int64_t blocks = 1;
  while (2 * blocks <= most) blocks *= 2;
  return std::min(tasks, std::max(2 * processors(), blocks));
}

// Tasks that work side by side each fill a workspace. One after another they fill one, and threads wait for each other
// many times, which costs a few percent. That is worth it where memory would grow by so much with every thread.
constexpr std::int64_t large_bytes = std::int64_t{16} << 20;
constexpr double mostly = 0.9;  // of a pass in operations that can use several threads

template <class R>
const packed::Kernels<R>& kernels_of(Isa isa) {
  if constexpr (std::is_same_v<R, float>)
    return packed::table_of(isa).f32;
  else
    return packed::table_of(isa).f64;
}

}  // namespace

// Tasks are summed in blocks and the blocks in pairs; tasks b, b + count, b + 2 count... make block b. The result does
// not depend on the number of threads. Small weights have many blocks, each of which one thread takes as a whole, so that
// its sum stays in that thread's cache. Large ones have few, whose sums would fill memory: threads take tasks, the first
// one first, and add to a block in turns. So they do where gradients are kept apart, which have one sum.
template <class R>
struct MetaGradient<R>::Blocks {
  std::int64_t count;
  bool in_turns;
};

// Offsets in the workspace of a task at work.
template <class R>
struct MetaGradient<R>::Layout {
  std::int64_t theta_size;
  std::int64_t theta, thetas;  // adapted weights after each step; in first order one set, where steps are taken
  std::int64_t g;              // gradients of each step, where rates are learned
  std::int64_t lam;            // of the adapted weights and, behind them, of other differentiated ones
  std::int64_t waiting;        // gradients on their way to lam
  std::int64_t apart[2];       // gradients that are kept apart: from the query set, and from the support set
  std::int64_t u;              // rates times lam, where each parameter has its own; else lam is the direction itself
  std::int64_t tape, tape_step, once, query_tape;
  std::int64_t tangent, tangent_step, scratch;
  std::int64_t total;
};

// The memory of a task at work, and the calls that work on it: for as long as weights and layout stay in their places.
template <class R>
struct MetaGradient<R>::Workspace : Memory<R> {
  using Memory<R>::Memory;

  const R* theta = nullptr;
  Kind kind{};
  int within = 0;
  Layout at{};
  std::vector<Calls<R>> support;         // one a step
  std::vector<TangentCalls<R>> tangents;  // one a step
  Calls<R> query;
  Calls<R> once;  // of the last sweep over operations that run once
  std::vector<std::vector<Past<R>>> pasts;  // of calls that collect a weight
  std::vector<double> d_alpha;              // of the task, where rates are learned

  // Adapted weights after so many steps, packed.
  R* weights(std::int64_t k) const { return this->data + at.theta + (k - 1) % at.thetas * at.theta_size; }
  R* gradient(std::int64_t k) const { return this->data + at.g + k * at.theta_size; }
  R* lam() const { return this->data + at.lam; }
};

// A thread's, where its time is wanted.
template <class R>
struct MetaGradient<R>::Watches {
  Stopwatch support, query;
};

template <class R>
MetaGradient<R>::MetaGradient(Program support, Program query, Isa isa)
    : isa_(isa),
      kernels_(kernels_of<R>(isa)),
      support_program_(std::move(support)),
      query_program_(std::move(query)),
      support_(support_program_, isa, kernels_, true),
      query_(query_program_, isa, kernels_, false),
      collects_(support_.collects()),
      thetas_(std::make_unique<Shelf<Memory<R>>>()),
      workspaces_(std::make_unique<Shelf<Workspace>>()) {
  if (support_.packing().sizes != query_.packing().sizes)
    throw std::invalid_argument("executor: support and query must hold the same weights, got other sizes");
}

template <class R>
MetaGradient<R>::~MetaGradient() = default;

template <class R>
std::unique_ptr<Profile> MetaGradient<R>::profile() const {
  return std::make_unique<Profile>(support_program_.operations.size(), query_program_.operations.size());
}

template <class R>
typename MetaGradient<R>::Layout MetaGradient<R>::layout(const Kind& kind, int within) const {
  const Packing& packing = support_.packing();
  Layout at{};
  const auto take = [&at](std::int64_t elements, std::int64_t times) {
    const std::int64_t offset = at.total;
    at.total += elements * times;
    return offset;
  };
  const bool second_order = kind.second_order;
  at.theta_size = packing.adapted;
  at.thetas = second_order ? std::max<std::int64_t>(1, kind.steps) : 1;
  at.theta = take(packing.adapted, at.thetas);
  // The last weights are the query's alone, which reads each for the last time before it writes its gradient.
  at.lam = at.theta + (at.thetas - 1) * packing.adapted;
  take(packing.differentiated - packing.adapted, 1);
  at.waiting = take(support_.waiting(), 1);
  at.apart[0] = take(query_.apart(), 1);
  at.apart[1] = take(support_.apart(), second_order ? 1 : 0);
  at.g = take(packing.adapted, kind.learned ? kind.steps : 0);
  at.u = take(packing.adapted, kind.rate_per_parameter ? 1 : 0);
  const bool keeps = second_order || collects_;
  at.tape_step = keeps ? support_.tape() : 0;
  at.tape = take(support_.tape(), keeps ? kind.steps : std::min<std::int64_t>(kind.steps, 1));
  at.once = take(support_.once(), 1);
  if (collects_) {  // of a collected weight all factors stay: the query's, and those of each step's tangents
    at.query_tape = take(query_.tape(), 1);
    at.tangent = take(support_.tangent(), second_order ? kind.steps : 0);
    at.tangent_step = support_.tangent();
  } else {
    at.query_tape = at.tangent = take(std::max(query_.tape(), support_.tangent()), 1);  // never in use together
  }
  at.scratch = take(std::max(support_.scratch(within), query_.scratch(within)), 1);
  return at;
}

template <class R>
std::int64_t MetaGradient<R>::workspace_bytes(const Kind& kind, int within) const {
  return static_cast<std::int64_t>(sizeof(R)) * layout(kind, within).total;
}

template <class R>
std::int64_t MetaGradient<R>::theta_elements(const Kind& kind) const {
  const std::int64_t adapted = support_program_.adapted, differentiated = support_program_.differentiated;
  return support_.packed_size() + kind.steps * (adapted + differentiated) + differentiated;
}

template <class R>
std::int64_t MetaGradient<R>::common_bytes(std::int64_t tasks, const Kind& kind) const {
  const std::int64_t sums = blocks(tasks, kind).count * support_.packing().gradient;
  return static_cast<std::int64_t>(sizeof(R)) * (theta_elements(kind) + sums);
}

template <class R>
typename MetaGradient<R>::Blocks MetaGradient<R>::blocks(std::int64_t tasks, const Kind& kind) const {
  const std::int64_t bytes = support_.packing().gradient * static_cast<std::int64_t>(sizeof(R));
  if (sharing(tasks, kind, 1).in_turn) return {1, true};
  if (bytes <= large_sums && query_.apart() == 0) return {blocks_of(tasks, bytes), false};
  // To collect a weight takes as long as half of a task; to add, a small part of one.
  constexpr std::int64_t adders = 4;
  return {std::min(tasks, collects_ ? processors() : std::max<std::int64_t>(1, processors() / adders)), true};
}

template <class R>
Sharing MetaGradient<R>::sharing(std::int64_t tasks, const Kind& kind, int threads) const {
  const bool sharable = query_.shared() > mostly, in_turn = sharable && workspace_bytes(kind, 1) > large_bytes;
  if (in_turn || (sharable && tasks < threads)) return {1, threads, in_turn};
  return {static_cast<int>(std::min<std::int64_t>(tasks, threads)), 1, false};
}

template <class R>
void MetaGradient<R>::check(const Request<R>& request) const {
  // Whether some whole number of a leaf's tasks is outside of [0, below) and not `other`, and the first such number.
  const auto outside = [&](const Leaf& leaf, std::int64_t count, std::int64_t below, std::int64_t other) {
    for (std::int64_t t = 0; t < request.tasks; ++t) {
      const auto* numbers = reinterpret_cast<const std::int64_t*>(leaf.address + t * leaf.stride);
      for (std::int64_t i = 0; i < count; ++i)
        if ((numbers[i] < 0 || numbers[i] >= below) && numbers[i] != other) return std::make_pair(true, numbers[i]);
    }
    return std::make_pair(false, std::int64_t{0});
  };
  for (const auto* program : {&support_program_, &query_program_}) {
    const std::vector<Leaf>& leaves = program == &support_program_ ? request.support : request.query;
    for (const Operation& operation : program->operations) {
      if (operation.table_rows == 0) continue;
      const auto [wrong, number] = outside(leaves[operation.x[0].index], operation.numbers, operation.table_rows, 0);
      if (wrong)
        throw std::out_of_range("embedding: indices must be in [0, " + std::to_string(operation.table_rows) +
                                "), got " + std::to_string(number) + "; check the tokenizer or the table's size");
    }
    const Operation& loss = program->operations.back();
    if (loss.classes == 0) continue;
    const auto [wrong, label] = outside(leaves[loss.target], loss.label_rows, loss.classes, loss.ignored);
    if (wrong)
      throw std::invalid_argument("cross_entropy: labels must be in [0, " + std::to_string(loss.classes) + "), got " +
                                  std::to_string(label) +
                                  "; relabel each task's classes from 0, or mark rows to leave out with " +
                                  "ignore_index=" + std::to_string(loss.ignored));
  }
}

template <class R>
void MetaGradient<R>::run(const Request<R>& request) {
  check(request);
  if (collects_ && (request.rate_per_parameter || request.d_alpha != nullptr))
    throw std::invalid_argument("executor: a collected weight must have one rate with all others, not learned");
  const Profile::Whole whole(request.profile);
  const Packing& packing = support_.packing();
  const bool gradient = request.gradient, learned = request.d_alpha != nullptr;
  const Kind kind{request.steps, gradient && !request.first_order, learned, request.rate_per_parameter};
  const Sharing share = sharing(request.tasks, kind, request.threads);
  const std::int64_t elements = layout(kind, share.within).total;
  const Blocks blocks = this->blocks(request.tasks, kind);
  const std::int64_t rates = request.steps * (request.rate_per_parameter ? support_program_.adapted : 1);

  const typename Shelf<Memory<R>>::Loan weights(*thetas_, theta_elements(kind), 0);
  R* theta = (*weights).data;
  support_.pack(request.parameters.data(), theta);
  write_rates(request, theta + support_.packed_size());

  BlockSums<R> sums(gradient ? blocks.count : 0, packing.gradient, kernels_);
  std::vector<double> d_alpha(learned ? blocks.count * rates : 0), losses(request.tasks);
  Turns adds(blocks.count), spreads(1, -1);  // the first of the latter when there is something to write to
  std::mutex mutex;
  std::exception_ptr failure;  // a thread that cannot have its workspace must not end the process
  const auto fails = [&] {
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
    }
    adds.stop();
    spreads.stop();
  };
  const auto own = [&] {
    try {
      if (request.own) request.own();
      if (gradient) query_.clear_apart(request.gradients.data());
      spreads.pass(0);
    } catch (...) {
      fails();
    }
  };
  // What a task leaves in its workspace goes to the sum of its block.
  const auto add = [&](const Workspace& workspace, std::int64_t task) {
    const std::int64_t block = task % blocks.count;
    const bool first = task < blocks.count;
    if (blocks.in_turns) adds.wait(block, task / blocks.count);
    if (first)
      std::memcpy(sums.of(block), workspace.lam(), sizeof(R) * packing.differentiated);
    else
      kernels_.add(sums.of(block), workspace.lam(), packing.differentiated);
    if (collects_) query_.collect(workspace.query, !first, sums.of(block), workspace.data + workspace.at.scratch);
    for (std::int64_t i = 0; learned && i < rates; ++i) d_alpha[block * rates + i] += workspace.d_alpha[i];
    if (blocks.in_turns) adds.pass(block);
    if (task + blocks.count >= request.tasks) sums.complete(block);
    if (query_.apart() == 0) return;
    spreads.wait(0, task);
    query_.spread(workspace.query, request.gradients.data());
    if (runs_once(workspace)) support_.spread(workspace.once, request.gradients.data());
    spreads.pass(0);
  };
  std::atomic<std::int64_t> next{0};  // task, where threads take tasks
  const auto work = [&](std::int64_t first, std::int64_t last, int seat) {
    try {
      const typename Shelf<Workspace>::Loan loan(*workspaces_, elements, seat);
      Workspace& workspace = *loan;
      bind(workspace, kind, share.within, theta);
      std::unique_ptr<Watches> watches;
      if (request.profile != nullptr)
        watches.reset(new Watches{Stopwatch(support_program_.operations.size()),
                                  Stopwatch(query_program_.operations.size())});
      const auto take = [&](std::int64_t task) {
        run_task(request, task, workspace, losses[task], watches.get());
        if (gradient) add(workspace, task);
      };
      if (blocks.in_turns)
        for (std::int64_t t = next++; t < request.tasks; t = next++) take(t);
      else
        for (std::int64_t b = first; b < last; ++b)
          for (std::int64_t t = b; t < request.tasks; t += blocks.count) take(t);
      if (watches != nullptr) request.profile->add(watches->support, watches->query, share.within);
    } catch (...) {
      fails();
    }
  };
  parallel_for(blocks.in_turns ? share.at_once : blocks.count, share.at_once, work, own);
  if (failure) std::rethrow_exception(failure);
  const double sum_of_losses = std::accumulate(losses.begin(), losses.end(), 0.0);
  *request.loss = static_cast<R>(sum_of_losses / static_cast<double>(request.tasks));
  if (!gradient) return;
  support_.unpack(sums.total(), request.gradients.data());
  if (!learned) return;
  for (std::int64_t b = 1; b < blocks.count; ++b)
    for (std::int64_t i = 0; i < rates; ++i) d_alpha[i] += d_alpha[b * rates + i];
  const std::int64_t entries = request.rate_per_parameter ? support_program_.adapted : 1;
  if (request.rate_per_step) {
    for (std::int64_t i = 0; i < rates; ++i) request.d_alpha[i] = static_cast<R>(d_alpha[i]);
  } else {
    for (std::int64_t i = 0; i < entries; ++i) {
      double sum = 0;
      for (std::int64_t k = 0; k < request.steps; ++k) sum += d_alpha[k * entries + i];
      request.d_alpha[i] = static_cast<R>(sum);
    }
  }
}

namespace {

// Calls f(first, last, rate) for every run of packed weights that share a rate at step k, and f's index of that rate.
template <class R, class F>
void for_each_rate(const Request<R>& request, const Packing& packing, std::int64_t parameters, std::int64_t k, F f) {
  const std::int64_t row = request.rate_per_parameter ? parameters : 1;
  const R* alpha = request.alpha + (request.rate_per_step ? k * row : 0);
  if (!request.rate_per_parameter) return f(std::int64_t{0}, packing.adapted, alpha[0], std::int64_t{0});
  for (std::int64_t p = 0; p < parameters; ++p)
    f(packing.offsets[p], p + 1 < parameters ? packing.offsets[p + 1] : packing.adapted, alpha[p], p);
}

}  // namespace

// For every step the rates of the steps along the gradients of adapted parameters, and of those along the products of
// differentiated ones: 1 where the direction has the rates already. Behind them -1 for each of the latter, a step along
// which adds a gradient.
template <class R>
void MetaGradient<R>::write_rates(const Request<R>& request, R* rates) const {
  const std::int64_t adapted = support_program_.adapted, differentiated = support_program_.differentiated;
  const std::int64_t row = request.rate_per_parameter ? adapted : 1;
  for (std::int64_t k = 0; k < request.steps; ++k, rates += adapted + differentiated) {
    const R* alpha = request.alpha + (request.rate_per_step ? k * row : 0);
    for (std::int64_t p = 0; p < adapted; ++p) rates[p] = alpha[request.rate_per_parameter ? p : 0];
    std::fill_n(rates + adapted, differentiated, request.rate_per_parameter ? R(1) : alpha[0]);
  }
  std::fill_n(rates, differentiated, R(-1));
}

template <class R>
void MetaGradient<R>::bind(Workspace& workspace, const Kind& kind, int within, const R* theta) const {
  if (workspace.theta == theta && workspace.kind == kind && workspace.within == within) return;
  const Layout at = layout(kind, within);
  R* memory = workspace.data;
  std::memset(memory, 0, sizeof(R) * workspace.size);  // another layout may have left something in the gaps
  workspace.theta = theta;
  workspace.kind = kind;
  workspace.within = within;
  workspace.at = at;
  workspace.support.clear();
  workspace.tangents.clear();
  const R* rates = theta + support_.packed_size();
  const R* own = theta;
  R *tape = memory + at.tape, *once = memory + at.once, *lam = workspace.lam(), *waiting = memory + at.waiting;
  for (std::int64_t k = 0; k < kind.steps; ++k) {
    Gradients<R> to{kind.learned ? workspace.gradient(k) : workspace.weights(k + 1), false};
    if (!kind.learned) {
      to.from = own;
      to.rates = rates;
      if (!kind.second_order) to.waiting = waiting;
    }
    workspace.support.push_back(support_.bind(tape + k * at.tape_step, once, own, theta, to, within));
    if (kind.second_order) {
      const Gradients<R> next{lam, true, lam, rates + support_program_.adapted, waiting};
      const R* u = kind.rate_per_parameter ? memory + at.u : lam;
      workspace.tangents.push_back(support_.bind_tangent(memory + at.tangent + k * at.tangent_step, u, next));
    }
    rates += support_program_.adapted + support_program_.differentiated;
    own = workspace.weights(k + 1);
  }
  workspace.query = query_.bind(memory + at.query_tape, nullptr, own, theta,
                                {lam, true, nullptr, nullptr, waiting, memory + at.apart[0]}, within);
  if (runs_once(workspace))  // `rates` have come to those that add
    workspace.once = support_.bind(tape, once, theta, theta, {lam, true, lam, rates, waiting, memory + at.apart[1]},
                                   within);
  if (collects_)
    workspace.pasts = support_.remember(workspace.support, workspace.tangents, workspace.query,
                                        theta + support_.packed_size(),
                                        support_program_.adapted + support_program_.differentiated);
}

template <class R>
bool MetaGradient<R>::runs_once(const Workspace& workspace) const {
  return workspace.kind.second_order && workspace.kind.steps > 0 && support_.sends();
}

template <class R>
void MetaGradient<R>::run_task(const Request<R>& request, std::int64_t task, Workspace& workspace, double& loss,
                               Watches* watches) const {
  Stopwatch* const on_support = watches == nullptr ? nullptr : &watches->support;
  Stopwatch* const on_query = watches == nullptr ? nullptr : &watches->query;
  const Packing& packing = support_.packing();
  const Layout& at = workspace.at;
  R* memory = workspace.data;
  R* scratch = memory + at.scratch;
  for (std::int64_t k = 0; k < request.steps; ++k) {  // eq. (2)-(3)
    const Calls<R>& calls = workspace.support[k];
    support_.aim(workspace.support[k], request.support, task, request.parameters.data());
    const R loss = support_.forward(calls, k > 0, scratch, on_support);
    if (request.support_losses != nullptr) request.support_losses[k * request.tasks + task] = loss;
    support_.backward(memory + at.tape + k * at.tape_step, memory + at.once, calls, R(1), scratch, on_support);
    if (!workspace.kind.learned) continue;
    const R *g = workspace.gradient(k), *own = k == 0 ? workspace.theta : workspace.weights(k);
    R* next = workspace.weights(k + 1);
    for_each_rate(request, packing, support_program_.adapted, k,
                  [&](std::int64_t begin, std::int64_t end, R rate, std::int64_t) {
                    kernels_.step(next + begin, own + begin, rate, g + begin, end - begin);
                  });
  }
  query_.aim(workspace.query, request.query, task, request.parameters.data());
  const R of_task = query_.forward(workspace.query, false, scratch, on_query);
  loss = static_cast<double>(of_task);
  if (request.losses != nullptr) request.losses[task] = of_task;
  R* tape = memory + at.query_tape;
  if (request.outputs != nullptr) {
    const R* rows = query_.output(tape);
    const std::int64_t columns = request.output_columns, row = query_.output_row(columns);
    R* out = request.outputs + task * request.output_rows * columns;
    for (std::int64_t i = 0; i < request.output_rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j) out[i * columns + j] = rows[i * row + j];
  }
  if (!request.gradient) return;
  const R d_loss = request.d_losses != nullptr ? request.d_losses[task] : R(1) / static_cast<R>(request.tasks);
  query_.backward(tape, nullptr, workspace.query, d_loss, scratch, on_query);
  adjoint(request, task, workspace, on_support);
}

// From lam of the query's weights to that of the shared ones.
template <class R>
void MetaGradient<R>::adjoint(const Request<R>& request, std::int64_t task, Workspace& workspace,
                              Stopwatch* watch) const {
  const Packing& packing = support_.packing();
  const Layout& at = workspace.at;
  const std::int64_t rates = request.rate_per_parameter ? support_program_.adapted : 1;
  const bool learned = request.d_alpha != nullptr, scales = request.rate_per_parameter && !request.first_order;
  R *memory = workspace.data, *scratch = memory + at.scratch, *lam = workspace.lam(), *u = memory + at.u;
  if (learned) workspace.d_alpha.assign(request.steps * rates, 0);
  for (std::int64_t k = request.steps - 1; k >= 0; --k) {
    if (learned || scales)
      for_each_rate(request, packing, support_program_.adapted, k,
                    [&](std::int64_t begin, std::int64_t end, R rate, std::int64_t index) {
                      const std::int64_t n = end - begin;
                      if (learned)
                        workspace.d_alpha[k * rates + index] -=
                            kernels_.dot(workspace.gradient(k) + begin, lam + begin, n);
                      if (scales) kernels_.scale(u + begin, rate, lam + begin, n);  // eq. (5)
                    });
    if (request.first_order) continue;
    R* tangent = memory + at.tangent + k * at.tangent_step;
    support_.hessian_product(tangent, workspace.support[k], workspace.tangents[k], scratch, watch);
    if (!runs_once(workspace)) continue;
    const std::int64_t row = support_program_.adapted + support_program_.differentiated;
    const R rate = workspace.theta[support_.packed_size() + k * row + support_program_.adapted];
    support_.send(memory + at.once, tangent, rate, k == request.steps - 1);
  }
  if (!runs_once(workspace)) return;
  support_.aim(workspace.once, request.support, task, request.parameters.data());
  support_.backward_once(memory + at.tape, memory + at.once, workspace.once, scratch, watch);
}

template class MetaGradient<float>;
template class MetaGradient<double>;

}  // namespace fastmeta::executor
