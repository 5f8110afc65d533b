// A program with a place for everything: where values, cotangents and tangents of one task lie, and its four sweeps.
#pragma once

#include <cstdint>
#include <vector>

#include "program.h"

namespace fastmeta::executor {

// Offsets in packed weights of all parameters, [adapted | differentiated | others].
struct Packing {
  std::vector<std::int64_t> offsets, sizes;
  std::int64_t adapted = 0, differentiated = 0, total = 0;  // elements, each count includes the one before
};

// One task's data tensors.
using Data = std::vector<const char*>;

template <class R>
struct Weights {
  const R* own;     // packed, of this task: the adapted ones
  const R* shared;  // packed, all of them: the others are read here
};

template <class R>
class Plan {
 public:
  Plan(const Program& program, Isa isa);

  const Packing& packing() const { return packing_; }
  std::int64_t tape() const { return tape_; }        // elements: what one pass leaves
  std::int64_t tangent() const { return tangent_; }  // elements: what a Hessian-vector product takes beside
  std::int64_t scratch() const { return scratch_; }

  void pack(const R* const* parameters, R* packed) const;
  void unpack(const R* packed, R* const* tensors) const;  // the differentiated ones

  // Runs the objective; its loss is returned.
  R forward(R* tape, const Data& data, Weights<R> w, R* scratch) const;
  // Gradient of d_loss times the loss by the adapted parameters, and by all differentiated ones if `all`; packed in dw.
  void backward(R* tape, const Data& data, Weights<R> w, R d_loss, R* dw, bool all, R* scratch) const;
  // Derivative of that gradient (with d_loss = 1, all parameters) along u, packed like the adapted ones.
  void hessian_product(R* tape, const Data& data, Weights<R> w, const R* u, R* tangent, R* dw_dot, R* scratch) const;

  // The value that the caller may ask for, rows that lie output_row apart.
  const R* output(const R* tape) const { return tape + slots_[program_.output].y; }
  std::int64_t output_row(std::int64_t columns) const { return columns + (row_unit_ - columns % row_unit_) % row_unit_; }

 private:
  // Of a value: where it and its cotangent lie on the tape, and their derivatives beside.
  struct Slot {
    std::int64_t y, dy, y_dot, dy_dot;
    bool varies, active;  // depends on adapted weights; on any weight whose gradient is wanted
  };
  struct Item {
    const Operation* operation;
    Maps<R> maps;
    std::int64_t saved, saved_dot;
    bool varies, active;
  };

  Primal<R> primal(const Item& item, R* tape, const Data& data, Weights<R> w) const;

  const Program& program_;
  Packing packing_;
  std::vector<Slot> slots_;
  std::vector<Item> items_;
  std::int64_t tape_ = 0, tangent_ = 0, scratch_ = 0;
  std::int64_t row_unit_;  // elements of a vector, to whole ones of which rows are padded
};

}  // namespace fastmeta::executor
