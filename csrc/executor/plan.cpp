#include "plan.h"

#include <algorithm>
#include <stdexcept>

#include "lifetimes.h"

namespace fastmeta::executor {
namespace {

// Every buffer starts at a cache line, which is also the widest vector.
template <class R>
std::int64_t aligned(std::int64_t elements) {
  constexpr std::int64_t line = 64 / sizeof(R);
  return (elements + line - 1) / line * line;
}

template <class R>
std::int64_t take(std::int64_t& total, std::int64_t elements) {
  const std::int64_t offset = total;
  total += aligned<R>(elements);
  return offset;
}

}  // namespace

template <class R>
Plan<R>::Plan(const Program& program, Isa isa, const packed::Kernels<R>& kernels, bool kept)
    : program_(program),
      kernels_(kernels),
      slots_(program.values),
      row_unit_(maps_of<R>(program.operations.front(), isa).width) {
  packing_.sizes.assign(program.parameters, 0);
  for (const Operation& operation : program.operations) {
    const Maps<R> maps = maps_of<R>(operation, isa);
    Item item{};
    item.operation = &operation;
    item.shape = operation.shape.get();
    item.maps = maps;
    item.sizes = maps.sizes(item.shape);
    item.collects = maps.collect != nullptr;
    item.spreads = maps.spread != nullptr;
    const Sizes& sizes = item.sizes;
    const int number = static_cast<int>(items_.size());
    for (int i = 0; i < max_weights; ++i) {
      const int p = operation.w[i];
      if (p == absent) continue;
      if (packing_.sizes[p] != 0) throw std::invalid_argument("executor: a parameter must have one reader, got two");
      packing_.sizes[p] = sizes.weights[i];
      item.varies = item.varies || p < program.adapted;
      item.active = item.active || p < program.differentiated;
      const bool formed = i > 0 || !(item.collects || item.spreads);
      if (formed && p < program.differentiated && !maps.takes_steps)
        item.waiting[i] = take<R>(waiting_, sizes.weights[i]);
    }
    if (item.spreads && (operation.w[0] < program.adapted || operation.w[0] >= program.differentiated))
      throw std::invalid_argument("executor: a gradient that is kept apart must be one of a weight that does not adapt");
    if (item.spreads) item.apart = take<R>(apart_, sizes.apart);
    if (item.collects && operation.w[0] >= program.adapted)
      throw std::invalid_argument("executor: a collected weight must adapt, got one that does not");
    for (const Source& x : operation.x) {
      if (x.is_data || x.index == absent) continue;
      slots_[x.index].readers.push_back(number);
      item.varies = item.varies || slots_[x.index].varies;
      item.active = item.active || slots_[x.index].active;
    }
    Slot& slot = slots_[operation.y];
    slot.varies = item.varies;
    slot.active = item.active;
    slot.maker = number;
    slot.size = aligned<R>(sizes.y);
    slot.y_dot = item.varies ? take<R>(tangent_, sizes.y) : 0;
    slot.dy_dot = item.active ? take<R>(tangent_, sizes.y) : 0;
    item.saved_dot = take<R>(tangent_, sizes.saved_dot);
    item.turned = take<R>(turned_, sizes.turned);
    items_.push_back(item);
  }
  if (kept && items_.back().varies)
    for (Item& item : items_) item.once = slots_[item.operation->y].once = !item.varies;
  share_cotangents();
  find_places(kept);
  packing_.offsets.resize(program.parameters);
  std::vector<bool> collected(program.parameters), apart(program.parameters);
  for (const Item& item : items_) {
    if (item.collects) collected[item.operation->w[0]] = true;
    if (item.spreads) apart[item.operation->w[0]] = true;
  }
  const auto place = [&](int first, int last, bool these) {
    for (int p = first; p < last; ++p)
      if (collected[p] == these && !apart[p]) packing_.offsets[p] = take<R>(packing_.total, packing_.sizes[p]);
    return packing_.total;
  };
  packing_.adapted = place(0, program.adapted, false);
  packing_.differentiated = place(program.adapted, program.differentiated, false);
  packing_.gradient = place(0, program.adapted, true);
  place(program.differentiated, program.parameters, false);
}

// A cotangent is the sum over readers. Sweeps back meet the last reader first: it writes, and the others add. Those that
// run once come after all others, in a sweep of their own.
template <class R>
void Plan<R>::share_cotangents() {
  for (std::size_t n = 0; n < items_.size(); ++n) {
    Item& item = items_[n];
    if (n + 1 < items_.size() && item.active && slots_[item.operation->y].readers.empty())
      throw std::invalid_argument("executor: the loss must depend on every value, got one that nothing reads");
    for (int i = 0; i < max_inputs; ++i) {
      const Source& x = item.operation->x[i];
      if (x.is_data || x.index == absent || !slots_[x.index].active) continue;
      Slot& slot = slots_[x.index];
      const auto varying = std::find_if(slot.readers.rbegin(), slot.readers.rend(),
                                        [&](int reader) { return !items_[reader].once; });
      slot.sent = slot.once && varying != slot.readers.rend();
      const bool last = item.once ? !slot.sent && slot.readers.back() == static_cast<int>(n)
                                  : *varying == static_cast<int>(n);
      // An operation that reads a value again writes by the first of those inputs.
      const bool again = std::any_of(item.operation->x, item.operation->x + i, [&](const Source& earlier) {
        return !earlier.is_data && earlier.index == x.index;
      });
      item.adds[i] = again || !last;
      if (item.adds[i]) aside_size_[i] = std::max(aside_size_[i], slot.size);
    }
  }
  for (int i = 0; i < max_inputs; ++i) aside_dot_[i] = take<R>(tangent_, aside_size_[i]);
}

// Operation i runs forward at time i, and back at time 2 n - i; in between, at n, the output is read.
template <class R>
void Plan<R>::find_places(bool kept) {
  const std::int64_t n = static_cast<std::int64_t>(items_.size());
  std::vector<Lifetime> buffers;
  const auto add = [&](std::int64_t size, std::int64_t first, std::int64_t last, std::int64_t* place,
                       bool once = false) {
    if (kept) {
      *place = take<R>(once ? once_ : tape_, size);
    } else {
      buffers.push_back({aligned<R>(size), first, last, place});
    }
  };
  for (Item& item : items_) {
    const int value = item.operation->y;
    Slot& slot = slots_[value];
    const std::int64_t reader = slot.readers.empty() ? n - 1 : slot.readers.back();  // the loss is read at once
    std::int64_t last = value == program_.output ? n : reader;
    for (const int r : slot.readers)
      if (items_[r].active && items_[r].sizes.rereads_x) last = std::max<std::int64_t>(last, 2 * n - r);
    if (item.active && item.sizes.rereads_y) last = 2 * n - slot.maker;
    // What a collected weight is made of stays to the end.
    const std::int64_t back = item.collects ? 2 * n + 1 : 2 * n - slot.maker;
    add(item.sizes.y, slot.maker, last, &slot.y, item.once);
    add(item.sizes.saved, slot.maker, item.active ? back : slot.maker, &item.saved, item.once);
    if (item.active) add(item.sizes.y, 2 * n - reader, back, &slot.dy, item.once);
  }
  for (int i = 0; i < max_inputs; ++i) add(aside_size_[i], n, 2 * n, &aside_[i]);
  if (!kept) tape_ = executor::find_places(buffers);
}

template <class R>
std::int64_t Plan<R>::scratch(int threads) const {
  std::int64_t most = 0;
  for (const Item& item : items_)
    most = std::max(most, aligned<R>(item.sizes.scratch) + threads * aligned<R>(item.sizes.thread_scratch));
  return most;
}

template <class R>
double Plan<R>::shared() const {
  double shared = 0, all = 0;
  for (const Item& item : items_) {
    // What it makes, and the weights that shared products read, stand for the time it takes.
    const bool shares = item.sizes.thread_scratch > 0;
    const auto size = static_cast<double>(item.sizes.y + item.sizes.saved + (shares ? item.sizes.weights[0] : 0));
    all += size;
    if (shares) shared += size;
  }
  return shared / all;
}

template <class R>
void Plan<R>::pack(const R* const* parameters, R* packed) const {
  for (const Item& item : items_) {
    const int* w = item.operation->w;
    for (int i = 0; i < max_weights; ++i)
      if (w[i] != absent && !(i == 0 && item.spreads))
        item.maps.pack(item.shape, i, parameters[w[i]], packed + packing_.offsets[w[i]]);
    if (item.sizes.turned > 0)
      item.maps.turn(item.shape, packed + packing_.offsets[w[0]], packed + packing_.total + item.turned);
  }
}

template <class R>
void Plan<R>::unpack(const R* packed, R* const* tensors) const {
  for (const Item& item : items_)
    for (int i = 0; i < max_weights; ++i)
      if (const int p = item.operation->w[i]; p != absent && p < program_.differentiated && !(i == 0 && item.spreads))
        item.maps.unpack(item.operation->shape.get(), i, packed + packing_.offsets[p], tensors[p]);
}

template <class R>
Step<R> Plan<R>::step_of(const Item& item, const Gradients<R>& to) const {
  Step<R> step{};
  for (int i = 0; i < max_weights; ++i) {
    const int q = item.operation->w[i];
    if (q == absent || to.from == nullptr || (i == 0 && (item.collects || item.spreads))) continue;
    step.from[i] = to.from + packing_.offsets[q];
    step.rate[i] = to.rates + q;
  }
  return step;
}

template <class R>
R* Plan<R>::gradient_of(const Item& item, int i, const Gradients<R>& to, Step<R>& step) const {
  const int q = item.operation->w[i];
  if (i == 0 && item.collects) return nullptr;
  if (i == 0 && item.spreads) return to.apart == nullptr ? nullptr : to.apart + item.apart;
  R* const dw = to.dw + packing_.offsets[q];
  if (to.waiting == nullptr || item.maps.takes_steps) return dw;
  step.to[i] = dw;
  return to.waiting + item.waiting[i];
}

template <class R>
Calls<R> Plan<R>::bind(R* tape, R* once, const R* own, const R* shared, const Gradients<R>& to, int threads) const {
  const int wanted = to.all ? program_.differentiated : program_.adapted;
  Calls<R> calls;
  for (const Item& item : items_) {
    const Operation& operation = *item.operation;
    Primal<R> p{};
    p.step = step_of(item, to);
    for (int i = 0; i < max_inputs; ++i) {
      const Source& x = operation.x[i];
      if (x.is_data || x.index == absent) continue;
      const Slot& slot = slots_[x.index];
      R* const memory = slot.once ? once : tape;
      p.x[i] = memory + slot.y;
      if (slot.active) p.dx[i] = item.adds[i] ? tape + aside_[i] : memory + slot.dy;
    }
    for (int i = 0; i < max_weights; ++i) {
      const int q = operation.w[i];
      if (q == absent) continue;
      const bool whole = i == 0 && item.collects;
      p.w[i] = (q < program_.adapted && !whole ? own : shared) + packing_.offsets[q];
      if (q < wanted) p.dw[i] = gradient_of(item, i, to, p.step);
    }
    const bool is_shared = own == shared || operation.w[0] >= program_.adapted;
    if (item.sizes.turned > 0 && is_shared) p.turned = shared + packing_.total + item.turned;
    R* const memory = item.once ? once : tape;
    p.y = memory + slots_[operation.y].y;
    p.dy = memory + slots_[operation.y].dy;
    p.saved = memory + item.saved;
    p.threads = threads;
    calls.push_back(p);
  }
  return calls;
}

template <class R>
TangentCalls<R> Plan<R>::bind_tangent(R* tangent, const R* u, const Gradients<R>& to) const {
  TangentCalls<R> calls;
  for (const Item& item : items_) {
    const Operation& operation = *item.operation;
    Tangent<R> t{};
    t.step = step_of(item, to);
    for (int i = 0; i < max_inputs; ++i) {
      const Source& x = operation.x[i];
      if (x.is_data || x.index == absent) continue;
      t.x_dot[i] = slots_[x.index].varies ? tangent + slots_[x.index].y_dot : nullptr;
      if (slots_[x.index].active) t.dx_dot[i] = tangent + (item.adds[i] ? aside_dot_[i] : slots_[x.index].dy_dot);
    }
    for (int i = 0; i < max_weights; ++i) {
      const int q = operation.w[i];
      if (q == absent) continue;
      if (i == 0 && item.collects) continue;
      t.w_dot[i] = q < program_.adapted ? u + packing_.offsets[q] : nullptr;
      if (q < program_.differentiated) t.dw_dot[i] = gradient_of(item, i, to, t.step);
    }
    t.y_dot = tangent + slots_[operation.y].y_dot;
    t.saved_dot = tangent + item.saved_dot;
    t.dy_dot = tangent + slots_[operation.y].dy_dot;
    calls.push_back(t);
  }
  return calls;
}

template <class R>
std::vector<std::vector<Past<R>>> Plan<R>::remember(std::vector<Calls<R>>& support,
                                                    std::vector<TangentCalls<R>>& tangents, Calls<R>& query,
                                                    const R* rates, std::int64_t row) const {
  std::vector<std::vector<Past<R>>> pasts(items_.size());
  const std::size_t steps = support.size();
  for (std::size_t n = 0; n < items_.size(); ++n) {
    if (!items_[n].collects) continue;
    std::vector<Past<R>>& past = pasts[n];
    for (std::size_t k = 0; k < steps; ++k)
      past.push_back({&support[k][n], tangents.empty() ? nullptr : &tangents[k][n],
                      rates + static_cast<std::int64_t>(k) * row + items_[n].operation->w[0]});
    for (std::size_t k = 0; k < steps; ++k) {
      support[k][n].past = past.data();
      support[k][n].taken = static_cast<std::int64_t>(k);
      if (tangents.empty()) continue;
      tangents[k][n].query = &query[n];
      tangents[k][n].passed = past.data() + k + 1;
      tangents[k][n].passed_steps = static_cast<std::int64_t>(steps - k - 1);
    }
    query[n].past = past.data();
    query[n].taken = static_cast<std::int64_t>(steps);
  }
  return pasts;
}

template <class R>
bool Plan<R>::collects() const {
  return std::any_of(items_.begin(), items_.end(), [](const Item& item) { return item.collects; });
}

template <class R>
void Plan<R>::collect(const Calls<R>& query, bool adds, R* gradient, R* scratch) const {
  for (std::size_t n = 0; n < items_.size(); ++n)
    if (items_[n].collects)
      items_[n].maps.collect(items_[n].shape, query[n], adds, gradient + packing_.offsets[items_[n].operation->w[0]],
                             scratch);
}

template <class R>
void Plan<R>::clear_apart(R* const* gradients) const {
  for (const Item& item : items_)
    if (item.spreads) std::fill_n(gradients[item.operation->w[0]], item.sizes.weights[0], R(0));
}

template <class R>
void Plan<R>::spread(const Calls<R>& calls, R* const* gradients) const {
  for (std::size_t n = 0; n < items_.size(); ++n)
    if (items_[n].spreads)
      items_[n].maps.spread(items_[n].shape, calls[n], calls[n].dw[0], gradients[items_[n].operation->w[0]]);
}

template <class R>
void Plan<R>::aim(Calls<R>& calls, const std::vector<Leaf>& data, std::int64_t task,
                  const R* const* parameters) const {
  const auto address = [&](int index) { return data[index].address + task * data[index].stride; };
  for (std::size_t n = 0; n < items_.size(); ++n) {
    const Operation& operation = *items_[n].operation;
    for (int i = 0; i < max_inputs; ++i)
      if (operation.x[i].is_data) calls[n].x[i] = reinterpret_cast<const R*>(address(operation.x[i].index));
    if (operation.target != absent) calls[n].target = address(operation.target);
    if (items_[n].spreads) calls[n].w[0] = parameters[operation.w[0]];
  }
}

template <class R>
void Plan<R>::add_cotangents(const Item& item, R* memory, R* once, const std::int64_t* aside,
                             std::int64_t Slot::*cotangent) const {
  for (int i = 0; i < max_inputs; ++i) {
    if (!item.adds[i]) continue;
    const Slot& slot = slots_[item.operation->x[i].index];
    kernels_.add((slot.once ? once : memory) + slot.*cotangent, memory + aside[i], slot.size);
  }
}

template <class R>
void Plan<R>::take_steps(const Item& item, const Step<R>& step, R* const* dw) const {
  if (item.maps.takes_steps) return;
  for (int i = 0; i < max_weights; ++i) {
    if (dw[i] == nullptr) continue;
    R* const to = step.to[i] != nullptr ? step.to[i] : dw[i];
    if (step.from[i] != nullptr)
      kernels_.step(to, step.from[i], *step.rate[i], dw[i], item.sizes.weights[i]);
    else if (to != dw[i])
      std::copy_n(dw[i], item.sizes.weights[i], to);
  }
}

template <class R>
R Plan<R>::forward(const Calls<R>& calls, bool again, R* scratch, Stopwatch* watch) const {
  if (watch != nullptr) watch->start();
  for (std::size_t n = 0; n < items_.size(); ++n) {
    if (again && items_[n].once) continue;
    items_[n].maps.forward(items_[n].shape, calls[n], scratch);
    if (watch != nullptr) watch->lap(n, forward_map);
  }
  return *calls.back().y;
}

template <class R>
void Plan<R>::backward(R* tape, R* once, const Calls<R>& calls, R d_loss, R* scratch, Stopwatch* watch) const {
  if (watch != nullptr) watch->start();
  tape[slots_[items_.back().operation->y].dy] = d_loss;
  for (std::size_t n = items_.size(); n-- > 0;) {
    if (!items_[n].active || items_[n].once) continue;
    items_[n].maps.backward(items_[n].shape, calls[n], scratch);
    take_steps(items_[n], calls[n].step, calls[n].dw);
    add_cotangents(items_[n], tape, once, aside_, &Slot::dy);
    if (watch != nullptr) watch->lap(n, backward_map);
  }
}

template <class R>
void Plan<R>::hessian_product(R* tangent, const Calls<R>& calls, const TangentCalls<R>& tangents, R* scratch,
                              Stopwatch* watch) const {
  for (std::size_t n = 0; n < items_.size(); ++n)
    if (!items_[n].varies && !items_[n].once) std::fill_n(tangents[n].saved_dot, items_[n].sizes.saved_dot, R(0));
  if (watch != nullptr) watch->start();
  for (std::size_t n = 0; n < items_.size(); ++n) {
    if (!items_[n].varies) continue;
    items_[n].maps.tangent(items_[n].shape, calls[n], tangents[n], scratch);
    if (watch != nullptr) watch->lap(n, tangent_map);
  }
  tangent[slots_[items_.back().operation->y].dy_dot] = 0;
  for (std::size_t n = items_.size(); n-- > 0;) {
    if (!items_[n].active || items_[n].once) continue;
    items_[n].maps.tangent_backward(items_[n].shape, calls[n], tangents[n], scratch);
    take_steps(items_[n], tangents[n].step, tangents[n].dw_dot);
    add_cotangents(items_[n], tangent, tangent, aside_dot_, &Slot::dy_dot);
    if (watch != nullptr) watch->lap(n, tangent_backward_map);
  }
}

template <class R>
bool Plan<R>::sends() const {
  return std::any_of(items_.begin(), items_.end(), [](const Item& item) { return item.once && item.active; });
}

template <class R>
void Plan<R>::send(R* once, const R* tangent, R rate, bool first) const {
  for (const Slot& slot : slots_) {
    if (!slot.sent) continue;
    R* const d = once + slot.dy;
    if (first) std::fill_n(d, slot.size, R(0));
    kernels_.step(d, d, rate, tangent + slot.dy_dot, slot.size);
  }
}

template <class R>
void Plan<R>::backward_once(R* tape, R* once, const Calls<R>& calls, R* scratch, Stopwatch* watch) const {
  if (watch != nullptr) watch->start();
  for (std::size_t n = items_.size(); n-- > 0;) {
    if (!items_[n].active || !items_[n].once) continue;
    items_[n].maps.backward(items_[n].shape, calls[n], scratch);
    take_steps(items_[n], calls[n].step, calls[n].dw);
    add_cotangents(items_[n], tape, once, aside_, &Slot::dy);
    if (watch != nullptr) watch->lap(n, backward_map);
  }
}

template class Plan<float>;
template class Plan<double>;

}  // namespace fastmeta::executor
