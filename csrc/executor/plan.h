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

// A data tensor of all tasks: the first task's address, and the distance to the next one's in bytes.
struct Leaf {
  const char* address;
  std::int64_t stride;
};

// Every operation's call, with all addresses filled in but those of the task's data.
template <class R>
using Calls = std::vector<Primal<R>>;
template <class R>
using TangentCalls = std::vector<Tangent<R>>;

template <class R>
class Plan {
 public:
  // What a pass leaves is `kept` as a whole for tangents, or only until its backward has read it for the last time.
  Plan(const Program& program, Isa isa, bool kept);

  const Packing& packing() const { return packing_; }
  std::int64_t tape() const { return tape_; }        // elements of a pass
  std::int64_t tangent() const { return tangent_; }  // elements: what a Hessian-vector product takes beside
  std::int64_t scratch(int threads) const;           // elements, where so many work on a task
  double shared() const;                             // the part of a pass in operations that can use several threads

  void pack(const R* const* parameters, R* packed) const;
  void unpack(const R* packed, R* const* tensors) const;  // the differentiated ones

  // Calls on this tape. `own` holds this task's adapted weights, packed, `shared` all weights; gradients go to `dw`:
  // those of all differentiated parameters if `all`, else those of the adapted ones. `threads` may work on a call.
  Calls<R> bind(R* tape, const R* own, const R* shared, R* dw, bool all, int threads) const;
  // Calls of a Hessian-vector product along u, packed like the adapted parameters, into dw_dot.
  TangentCalls<R> bind_tangent(R* tangent, const R* u, R* dw_dot) const;
  // Fills in the addresses of a task's data.
  void aim(Calls<R>& calls, const std::vector<Leaf>& data, std::int64_t task) const;

  // Runs the objective; its loss is returned.
  R forward(const Calls<R>& calls, R* scratch) const;
  // Gradient of d_loss times the loss.
  void backward(R* tape, const Calls<R>& calls, R d_loss, R* scratch) const;
  // Derivative of that gradient (with d_loss = 1, all differentiated parameters).
  void hessian_product(R* tangent, const Calls<R>& calls, const TangentCalls<R>& tangents, R* scratch) const;

  // The value that the caller may ask for, rows that lie output_row apart.
  const R* output(const R* tape) const { return tape + slots_[program_.output].y; }
  std::int64_t output_row(std::int64_t columns) const { return columns + (row_unit_ - columns % row_unit_) % row_unit_; }

 private:
  // Of a value: where it and its cotangent lie on the tape, and their derivatives beside.
  struct Slot {
    std::int64_t y, dy, y_dot, dy_dot;
    bool varies, active;  // depends on adapted weights; on any weight whose gradient is wanted
    int maker, reader;    // operations; the loss has no reader
  };
  struct Item {
    const Operation* operation;
    const void* shape;
    Maps<R> maps;
    Sizes sizes;
    std::int64_t saved, saved_dot;
    bool varies, active;
  };

  void find_places(bool kept);

  const Program& program_;
  Packing packing_;
  std::vector<Slot> slots_;
  std::vector<Item> items_;
  std::int64_t tape_ = 0, tangent_ = 0;
  std::int64_t row_unit_;  // elements of a vector, to whole ones of which rows are padded
};

}  // namespace fastmeta::executor
