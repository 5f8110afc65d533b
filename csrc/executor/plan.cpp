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
Plan<R>::Plan(const Program& program, Isa isa)
    : program_(program), slots_(program.values), row_unit_(maps_of<R>(program.operations.front(), isa).width) {
  packing_.sizes.assign(program.parameters, 0);
  std::vector<bool> read(program.values, false);
  for (const Operation& operation : program.operations) {
    Item item{&operation, maps_of<R>(operation, isa), 0, 0, false, false};
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
      if (read[x.index]) throw std::invalid_argument("executor: a value must have one reader, got two");
      read[x.index] = true;
      item.varies = item.varies || slots_[x.index].varies;
      item.active = item.active || slots_[x.index].active;
    }
    Slot& slot = slots_[operation.y];
    slot.varies = item.varies;
    slot.active = item.active;
    slot.y = take<R>(tape_, sizes.y);
    slot.dy = item.active ? take<R>(tape_, sizes.y) : 0;
    slot.y_dot = item.varies ? take<R>(tangent_, sizes.y) : 0;
    slot.dy_dot = item.active ? take<R>(tangent_, sizes.y) : 0;
    item.saved = take<R>(tape_, sizes.saved);
    item.saved_dot = take<R>(tangent_, sizes.saved_dot);
    scratch_ = std::max(scratch_, aligned<R>(sizes.scratch));
    items_.push_back(item);
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
Primal<R> Plan<R>::primal(const Item& item, R* tape, const Data& data, Weights<R> w) const {
  const Operation& operation = *item.operation;
  Primal<R> p{};
  for (int i = 0; i < max_inputs; ++i) {
    const Source& x = operation.x[i];
    if (x.index == absent) continue;
    p.x[i] = x.is_data ? reinterpret_cast<const R*>(data[x.index]) : tape + slots_[x.index].y;
    p.dx[i] = !x.is_data && slots_[x.index].active ? tape + slots_[x.index].dy : nullptr;
  }
  if (operation.target != absent) p.target = data[operation.target];
  for (int i = 0; i < max_weights; ++i)
    if (const int q = operation.w[i]; q != absent)
      p.w[i] = (q < program_.adapted ? w.own : w.shared) + packing_.offsets[q];
  p.y = tape + slots_[operation.y].y;
  p.dy = tape + slots_[operation.y].dy;
  p.saved = tape + item.saved;
  return p;
}

template <class R>
R Plan<R>::forward(R* tape, const Data& data, Weights<R> w, R* scratch) const {
  for (const Item& item : items_)
    item.maps.forward(item.operation->shape.get(), primal(item, tape, data, w), scratch);
  return tape[slots_[items_.back().operation->y].y];
}

template <class R>
void Plan<R>::backward(R* tape, const Data& data, Weights<R> w, R d_loss, R* dw, bool all, R* scratch) const {
  tape[slots_[items_.back().operation->y].dy] = d_loss;
  const int wanted = all ? program_.differentiated : program_.adapted;
  for (auto item = items_.rbegin(); item != items_.rend(); ++item) {
    if (!item->active) continue;
    Primal<R> p = primal(*item, tape, data, w);
    for (int i = 0; i < max_weights; ++i)
      if (const int q = item->operation->w[i]; q != absent && q < wanted) p.dw[i] = dw + packing_.offsets[q];
    item->maps.backward(item->operation->shape.get(), p, scratch);
  }
}

template <class R>
void Plan<R>::hessian_product(R* tape, const Data& data, Weights<R> w, const R* u, R* tangent, R* dw_dot,
                              R* scratch) const {
  const auto tangents = [&](const Item& item) {
    const Operation& operation = *item.operation;
    Tangent<R> t{};
    for (int i = 0; i < max_inputs; ++i) {
      const Source& x = operation.x[i];
      if (x.is_data || x.index == absent) continue;
      t.x_dot[i] = slots_[x.index].varies ? tangent + slots_[x.index].y_dot : nullptr;
      t.dx_dot[i] = slots_[x.index].active ? tangent + slots_[x.index].dy_dot : nullptr;
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
    return t;
  };
  for (const Item& item : items_)
    if (item.varies)
      item.maps.tangent(item.operation->shape.get(), primal(item, tape, data, w), tangents(item), scratch);
  tangent[slots_[items_.back().operation->y].dy_dot] = 0;
  for (auto item = items_.rbegin(); item != items_.rend(); ++item)
    if (item->active)
      item->maps.tangent_backward(item->operation->shape.get(), primal(*item, tape, data, w), tangents(*item), scratch);
}

template class Plan<float>;
template class Plan<double>;

}  // namespace fastmeta::executor
