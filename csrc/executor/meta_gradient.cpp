#include "meta_gradient.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../common/threads.h"

namespace fastmeta::executor {
namespace {

// Tasks are summed in at most so many blocks, each in order, and then the blocks in order: the result does not depend
// on the number of threads.
constexpr std::int64_t most_blocks = 16;

template <class R>
const packed::Kernels<R>& kernels_of(Isa isa) {
  if constexpr (std::is_same_v<R, float>)
    return packed::table_of(isa).f32;
  else
    return packed::table_of(isa).f64;
}

}  // namespace

// Offsets in a thread's workspace.
template <class R>
struct MetaGradient<R>::Layout {
  std::int64_t theta, theta_step;  // adapted weights after each step; one set, overwritten, in first order
  std::int64_t g, g_step;          // gradients of each step; one set unless rates are learned
  std::int64_t lam, u, product;
  std::int64_t tape, tape_step, query_tape;
  std::int64_t tangent, scratch;
  std::int64_t total;
};

template <class R>
struct MetaGradient<R>::Memory {
  explicit Memory(std::int64_t elements)
      : size(elements), data(static_cast<R*>(::operator new(sizeof(R) * elements, std::align_val_t{64}))) {
    std::memset(data, 0, sizeof(R) * elements);  // gaps between weights stay zero
  }
  ~Memory() { ::operator delete(data, std::align_val_t{64}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::int64_t size;
  R* data;
};

// A workspace for as long as a thread is at work.
template <class R>
class MetaGradient<R>::Loan {
 public:
  Loan(MetaGradient& owner, std::int64_t elements) : owner_(owner) {
    {
      std::lock_guard<std::mutex> lock(owner_.mutex_);
      if (!owner_.free_.empty()) {
        memory_ = std::move(owner_.free_.back());
        owner_.free_.pop_back();
      }
    }
    if (memory_ == nullptr || memory_->size < elements) {
      memory_.reset();
      memory_ = std::make_unique<Memory>(elements);
    }
  }
  ~Loan() {
    std::lock_guard<std::mutex> lock(owner_.mutex_);
    owner_.free_.push_back(std::move(memory_));
  }
  Loan(const Loan&) = delete;
  Loan& operator=(const Loan&) = delete;

  R* data() const { return memory_->data; }

 private:
  MetaGradient& owner_;
  std::unique_ptr<Memory> memory_;
};

template <class R>
MetaGradient<R>::MetaGradient(Program support, Program query, Isa isa)
    : isa_(isa),
      kernels_(kernels_of<R>(isa)),
      support_program_(std::move(support)),
      query_program_(std::move(query)),
      support_(support_program_, isa),
      query_(query_program_, isa) {
  if (support_.packing().sizes != query_.packing().sizes)
    throw std::invalid_argument("executor: support and query must hold the same weights, got other sizes");
}

template <class R>
MetaGradient<R>::~MetaGradient() = default;

template <class R>
typename MetaGradient<R>::Layout MetaGradient<R>::layout(std::int64_t steps, bool second_order, bool learned) const {
  const Packing& packing = support_.packing();
  Layout at{};
  const auto take = [&at](std::int64_t elements, std::int64_t times) {
    const std::int64_t offset = at.total;
    at.total += elements * times;
    return offset;
  };
  const std::int64_t kept = second_order ? steps : std::min<std::int64_t>(steps, 1);
  at.theta_step = second_order ? packing.adapted : 0;
  at.theta = take(packing.adapted, kept);
  at.g_step = learned ? packing.adapted : 0;
  at.g = take(packing.adapted, learned ? steps : 1);
  at.lam = take(packing.differentiated, 1);
  at.u = take(packing.adapted, 1);
  at.product = take(packing.differentiated, 1);
  at.tape_step = second_order ? support_.tape() : 0;
  at.tape = take(support_.tape(), kept);
  at.query_tape = take(query_.tape(), 1);
  at.tangent = take(support_.tangent(), 1);
  at.scratch = take(std::max(support_.scratch(), query_.scratch()), 1);
  return at;
}

template <class R>
std::int64_t MetaGradient<R>::workspace_bytes(std::int64_t steps, bool second_order, bool learned) const {
  return static_cast<std::int64_t>(sizeof(R)) * layout(steps, second_order, learned).total;
}

template <class R>
void MetaGradient<R>::check(const Request<R>& request) const {
  for (const auto* program : {&support_program_, &query_program_}) {
    const Operation& loss = program->operations.back();
    if (loss.classes == 0) continue;
    const Leaf leaf = (program == &support_program_ ? request.support : request.query)[loss.target];
    const std::int64_t rows = loss.label_rows;
    for (std::int64_t t = 0; t < request.tasks; ++t) {
      const auto* labels = reinterpret_cast<const std::int64_t*>(leaf.address + t * leaf.stride);
      for (std::int64_t i = 0; i < rows; ++i)
        if ((labels[i] < 0 || labels[i] >= loss.classes) && labels[i] != loss.ignored)
          throw std::invalid_argument("cross_entropy: labels must be in [0, " + std::to_string(loss.classes) +
                                      "), got " + std::to_string(labels[i]) +
                                      "; relabel each task's classes from 0, or mark rows to leave out with ignore_index=" +
                                      std::to_string(loss.ignored));
    }
  }
}

template <class R>
void MetaGradient<R>::run(const Request<R>& request) {
  check(request);
  const Packing& packing = support_.packing();
  const bool gradient = request.gradient, learned = request.d_alpha != nullptr;
  const Layout at = layout(request.steps, gradient && !request.first_order, learned);
  const std::int64_t blocks = std::min(request.tasks, most_blocks);
  const std::int64_t rates = request.steps * (request.rate_per_parameter ? support_program_.adapted : 1);

  std::vector<R> theta(packing.total + 64 / sizeof(R));
  R* shared = theta.data();
  while (reinterpret_cast<std::uintptr_t>(shared) % 64 != 0) ++shared;
  support_.pack(request.parameters.data(), shared);

  // Not initialised: the first task of a block writes, the others add.
  const std::unique_ptr<R[]> totals(gradient ? new R[blocks * packing.differentiated] : nullptr);
  std::vector<double> d_alpha(learned ? blocks * rates : 0);
  parallel_for(blocks, request.threads, [&](std::int64_t first, std::int64_t last) {
    const Loan workspace(*this, at.total);
    for (std::int64_t b = first; b < last; ++b)
      for (std::int64_t begin = request.tasks * b / blocks, t = begin; t < request.tasks * (b + 1) / blocks; ++t)
        run_task(request, at, t, workspace.data(), shared, totals.get() + b * packing.differentiated, t == begin,
                 d_alpha.data() + b * rates);
  });
  double loss = 0;
  for (std::int64_t t = 0; t < request.tasks; ++t) loss += static_cast<double>(request.losses[t]);
  *request.loss = static_cast<R>(loss / static_cast<double>(request.tasks));
  if (!gradient) return;
  for (std::int64_t b = 1; b < blocks; ++b)
    kernels_.add(totals.get(), totals.get() + b * packing.differentiated, packing.differentiated);
  support_.unpack(totals.get(), request.gradients.data());
  if (!learned) return;
  for (std::int64_t b = 1; b < blocks; ++b)
    for (std::int64_t i = 0; i < rates; ++i) d_alpha[i] += d_alpha[b * rates + i];
  const std::int64_t row = request.rate_per_parameter ? support_program_.adapted : 1;
  if (request.rate_per_step) {
    for (std::int64_t i = 0; i < rates; ++i) request.d_alpha[i] = static_cast<R>(d_alpha[i]);
  } else {
    for (std::int64_t i = 0; i < row; ++i) {
      double sum = 0;
      for (std::int64_t k = 0; k < request.steps; ++k) sum += d_alpha[k * row + i];
      request.d_alpha[i] = static_cast<R>(sum);
    }
  }
}

namespace {

void find(const std::vector<Leaf>& leaves, std::int64_t task, Data& data) {
  data.resize(leaves.size());
  for (std::size_t i = 0; i < leaves.size(); ++i) data[i] = leaves[i].address + task * leaves[i].stride;
}

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

template <class R>
void MetaGradient<R>::run_task(const Request<R>& request, const Layout& at, std::int64_t task, R* memory,
                               const R* theta, R* total, bool first, double* d_alpha) const {
  const Packing& packing = support_.packing();
  thread_local Data support, query;  // a vector whose memory stays from task to task
  find(request.support, task, support);
  find(request.query, task, query);
  const R* own = theta;
  for (std::int64_t k = 0; k < request.steps; ++k) {  // eq. (2)-(3)
    R* tape = memory + at.tape + k * at.tape_step;
    R* g = memory + at.g + k * at.g_step;
    R* next = memory + at.theta + k * at.theta_step;
    const R loss = support_.forward(tape, support, {own, theta}, memory + at.scratch);
    if (request.support_losses != nullptr) request.support_losses[k * request.tasks + task] = loss;
    support_.backward(tape, support, {own, theta}, R(1), g, false, memory + at.scratch);
    for_each_rate(request, packing, support_program_.adapted, k,
                  [&](std::int64_t first, std::int64_t last, R rate, std::int64_t) {
                    kernels_.step(next + first, own + first, rate, g + first, last - first);
                  });
    own = next;
  }
  R* tape = memory + at.query_tape;
  request.losses[task] = query_.forward(tape, query, {own, theta}, memory + at.scratch);
  if (request.outputs != nullptr) {
    const R* rows = query_.output(tape);
    const std::int64_t columns = request.output_columns, row = query_.output_row(columns);
    R* out = request.outputs + task * request.output_rows * columns;
    for (std::int64_t i = 0; i < request.output_rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j) out[i * columns + j] = rows[i * row + j];
  }
  if (!request.gradient) return;
  const R d_loss = request.d_losses != nullptr ? request.d_losses[task] : R(1) / static_cast<R>(request.tasks);
  query_.backward(tape, query, {own, theta}, d_loss, memory + at.lam, true, memory + at.scratch);
  adjoint(request, at, support, memory, theta, d_alpha);
  if (first)
    std::memcpy(total, memory + at.lam, sizeof(R) * packing.differentiated);
  else
    kernels_.add(total, memory + at.lam, packing.differentiated);
}

template <class R>
void MetaGradient<R>::adjoint(const Request<R>& request, const Layout& at, const Data& support, R* memory,
                              const R* theta, double* d_alpha) const {
  const Packing& packing = support_.packing();
  const std::int64_t rates = request.rate_per_parameter ? support_program_.adapted : 1;
  R* lam = memory + at.lam;
  R* u = memory + at.u;
  const R* product = memory + at.product;
  for (std::int64_t k = request.steps - 1; k >= 0; --k) {
    const R* g = memory + at.g + k * at.g_step;
    for_each_rate(request, packing, support_program_.adapted, k,
                  [&](std::int64_t first, std::int64_t last, R rate, std::int64_t index) {
                    if (request.d_alpha != nullptr)
                      d_alpha[k * rates + index] -= kernels_.dot(g + first, lam + first, last - first);
                    kernels_.scale(u + first, rate, lam + first, last - first);
                  });
    if (request.first_order) continue;
    const R* own = k == 0 ? theta : memory + at.theta + (k - 1) * at.theta_step;
    support_.hessian_product(memory + at.tape + k * at.tape_step, support, {own, theta}, u, memory + at.tangent,
                             memory + at.product, memory + at.scratch);
    kernels_.subtract(lam, product, packing.differentiated);
  }
}

template class MetaGradient<float>;
template class MetaGradient<double>;

}  // namespace fastmeta::executor
