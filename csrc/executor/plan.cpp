#include "plan.h"

#include <algorithm>
#include <stdexcept>

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
Plan<R>::Plan(const Program& program, Isa isa, const packed::Kernels<R>& kernels)
    : program_(program),
      kernels_(kernels),
      slots_(program.values),
      row_unit_(maps_of<R>(program.operations.front(), isa).width) {
  packing_.sizes.assign(program.parameters, 0);
  for (const Operation& operation : program.operations) {
    Item item{&operation, operation.shape.get(), maps_of<R>(operation, isa), 0, 0, false, false, {}};
    const Sizes sizes = item.maps.sizes(operation.shape.get());
    for (int i = 0; i < max_weights; ++i) {
      const int p = operation.w[i];
      if (p == absent) continue;
      if (packing_.sizes[p] != 0) throw std::invalid_argument("executor: a parameter must have one reader, got two");
      packing_.sizes[p] = sizes.weights[i];
      item.varies = item.varies || p < program.adapted;
      item.active = item.active || p < program.differentiated;
    }
    for (const Source& x : operation.x) {
      if (x.is_data || x.index == absent) continue;
      item.varies = item.varies || slots_[x.index].varies;
      item.active = item.active || slots_[x.index].active;
    }
    Slot& slot = slots_[operation.y];
    slot.varies = item.varies;
    slot.active = item.active;
    slot.size = aligned<R>(sizes.y);
    slot.y = take<R>(tape_, sizes.y);
    slot.dy = item.active ? take<R>(tape_, sizes.y) : 0;
    slot.y_dot = item.varies ? take<R>(tangent_, sizes.y) : 0;
    slot.dy_dot = item.active ? take<R>(tangent_, sizes.y) : 0;
    item.saved = take<R>(tape_, sizes.saved);
    item.saved_dot = take<R>(tangent_, sizes.saved_dot);
    scratch_ = std::max(scratch_, aligned<R>(sizes.scratch));
    items_.push_back(item);
  }
  // A cotangent is the sum over readers. Sweeps back meet the last reader first: it writes, and the others add.
  std::vector<bool> written(program.values, false);
  std::int64_t most[max_inputs] = {};
  for (std::size_t n = items_.size(); n-- > 0;) {
    if (n + 1 < items_.size() && items_[n].active && !written[items_[n].operation->y])
      throw std::invalid_argument("executor: the loss must depend on every value, got one that nothing reads");
    for (int i = 0; i < max_inputs; ++i) {
      const Source& x = items_[n].operation->x[i];
      if (x.is_data || x.index == absent || !slots_[x.index].active) continue;
      items_[n].adds[i] = written[x.index];
      if (written[x.index]) most[i] = std::max(most[i], slots_[x.index].size);
      written[x.index] = true;
    }
  }
  for (int i = 0; i < max_inputs; ++i) {
    aside_[i] = take<R>(tape_, most[i]);
    aside_dot_[i] = take<R>(tangent_, most[i]);
  }
  packing_.offsets.resize(program.parameters);
  for (int p = 0; p < program.parameters; ++p) {
    packing_.offsets[p] = take<R>(packing_.total, packing_.sizes[p]);
    if (p < program.adapted) packing_.adapted = packing_.total;
    if (p < program.differentiated) packing_.differentiated = packing_.total;
  }
}

template <class R>
void Plan<R>::pack(const R* const* parameters, R* packed) const {
  for (const Item& item : items_)
    for (int i = 0; i < max_weights; ++i)
      if (const int p = item.operation->w[i]; p != absent)
        item.maps.pack(item.operation->shape.get(), i, parameters[p], packed + packing_.offsets[p]);
}

template <class R>
void Plan<R>::unpack(const R* packed, R* const* tensors) const {
  for (const Item& item : items_)
    for (int i = 0; i < max_weights; ++i)
      if (const int p = item.operation->w[i]; p != absent && p < program_.differentiated)
        item.maps.unpack(item.operation->shape.get(), i, packed + packing_.offsets[p], tensors[p]);
}

template <class R>
Calls<R> Plan<R>::bind(R* tape, const R* own, const R* shared, R* dw, bool all) const {
  const int wanted = all ? program_.differentiated : program_.adapted;
  Calls<R> calls;
  for (const Item& item : items_) {
    const Operation& operation = *item.operation;
    Primal<R> p{};
    for (int i = 0; i < max_inputs; ++i) {
      const Source& x = operation.x[i];
      if (x.is_data || x.index == absent) continue;
      p.x[i] = tape + slots_[x.index].y;
      if (slots_[x.index].active) p.dx[i] = tape + (item.adds[i] ? aside_[i] : slots_[x.index].dy);
    }
    for (int i = 0; i < max_weights; ++i) {
      const int q = operation.w[i];
      if (q == absent) continue;
      p.w[i] = (q < program_.adapted ? own : shared) + packing_.offsets[q];
      p.dw[i] = q < wanted ? dw + packing_.offsets[q] : nullptr;
    }
    p.y = tape + slots_[operation.y].y;
    p.dy = tape + slots_[operation.y].dy;
    p.saved = tape + item.saved;
    calls.push_back(p);
  }
  return calls;
}

template <class R>
TangentCalls<R> Plan<R>::bind_tangent(R* tangent, const R* u, R* dw_dot) const {
  TangentCalls<R> calls;
  for (const Item& item : items_) {
    const Operation& operation = *item.operation;
    Tangent<R> t{};
    for (int i = 0; i < max_inputs; ++i) {
      const Source& x = operation.x[i];
      if (x.is_data || x.index == absent) continue;
      t.x_dot[i] = slots_[x.index].varies ? tangent + slots_[x.index].y_dot : nullptr;
      if (slots_[x.index].active) t.dx_dot[i] = tangent + (item.adds[i] ? aside_dot_[i] : slots_[x.index].dy_dot);
    }
    for (int i = 0; i < max_weights; ++i) {
      const int q = operation.w[i];
      if (q == absent) continue;
      t.w_dot[i] = q < program_.adapted ? u + packing_.offsets[q] : nullptr;
      t.dw_dot[i] = q < program_.differentiated ? dw_dot + packing_.offsets[q] : nullptr;
    }
    t.y_dot = tangent + slots_[operation.y].y_dot;
    t.saved_dot = tangent + item.saved_dot;
    t.dy_dot = tangent + slots_[operation.y].dy_dot;
    calls.push_back(t);
  }
  return calls;
}

template <class R>
void Plan<R>::aim(Calls<R>& calls, const std::vector<Leaf>& data, std::int64_t task) const {
  const auto address = [&](int index) { return data[index].address + task * data[index].stride; };
  for (std::size_t n = 0; n < items_.size(); ++n) {
    const Operation& operation = *items_[n].operation;
    for (int i = 0; i < max_inputs; ++i)
      if (operation.x[i].is_data) calls[n].x[i] = reinterpret_cast<const R*>(address(operation.x[i].index));
    if (operation.target != absent) calls[n].target = address(operation.target);
  }
}

template <class R>
void Plan<R>::add_cotangents(const Item& item, R* memory, const std::int64_t* aside,
                             std::int64_t Slot::*cotangent) const {
  for (int i = 0; i < max_inputs; ++i) {
    if (!item.adds[i]) continue;
    const Slot& slot = slots_[item.operation->x[i].index];
    kernels_.add(memory + slot.*cotangent, memory + aside[i], slot.size);
  }
}

template <class R>
R Plan<R>::forward(const Calls<R>& calls, R* scratch) const {
  for (std::size_t n = 0; n < items_.size(); ++n) items_[n].maps.forward(items_[n].shape, calls[n], scratch);
  return *calls.back().y;
}

template <class R>
void Plan<R>::backward(R* tape, const Calls<R>& calls, R d_loss, R* scratch) const {
  tape[slots_[items_.back().operation->y].dy] = d_loss;
  for (std::size_t n = items_.size(); n-- > 0;) {
    if (!items_[n].active) continue;
    items_[n].maps.backward(items_[n].shape, calls[n], scratch);
    add_cotangents(items_[n], tape, aside_, &Slot::dy);
  }
}

template <class R>
void Plan<R>::hessian_product(R* tangent, const Calls<R>& calls, const TangentCalls<R>& tangents, R* scratch) const {
  for (std::size_t n = 0; n < items_.size(); ++n)
    if (items_[n].varies) items_[n].maps.tangent(items_[n].shape, calls[n], tangents[n], scratch);
  tangent[slots_[items_.back().operation->y].dy_dot] = 0;
  for (std::size_t n = items_.size(); n-- > 0;) {
    if (!items_[n].active) continue;
    items_[n].maps.tangent_backward(items_[n].shape, calls[n], tangents[n], scratch);
    add_cotangents(items_[n], tangent, aside_dot_, &Slot::dy_dot);
  }
}

template class Plan<float>;
template class Plan<double>;

}  // namespace fastmeta::executor
