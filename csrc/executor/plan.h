// A program with a place for everything: where values, cotangents and tangents of one task lie, and its four sweeps.
#pragma once

#include <cstdint>
#include <vector>

#include "packed.h"
#include "profile.h"
#include "program.h"

namespace fastmeta::executor {

// Offsets in packed weights of all parameters, [adapted | differentiated | collected | others]. Collected weights
// adapt, but are formed for no task; their gradients are. Weights whose gradients are kept apart have no place here.
struct Packing {
  std::vector<std::int64_t> offsets, sizes;
  std::int64_t adapted = 0, differentiated = 0, gradient = 0, total = 0;  // elements, each includes the one before
};

// A data tensor of all tasks: the first task's address, and the distance to the next one's in bytes.
struct Leaf {
  const char* address;
  std::int64_t stride;
};

// Where gradients go: packed like weights, with the steps that are taken along them.
template <class R>
struct Gradients {
  R* dw;
  bool all;                  // of all differentiated parameters, else of the adapted ones
  const R* from = nullptr;   // null: no steps
  const R* rates = nullptr;  // one a parameter
  R* waiting = nullptr;      // where those wait that may not be written to `dw` at once; null where all may
  R* apart = nullptr;        // where those go that are kept apart
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
  // A plan that keeps runs again and again on the same data: operations that no adapted weight reaches run in the first
  // pass alone, and their part of the tape is kept once.
  Plan(const Program& program, Isa isa, const packed::Kernels<R>& kernels, bool kept);

  const Packing& packing() const { return packing_; }
  std::int64_t tape() const { return tape_; }        // elements of a pass
  std::int64_t once() const { return once_; }        // elements of what all passes share
  std::int64_t tangent() const { return tangent_; }  // elements: what a Hessian-vector product takes beside
  std::int64_t waiting() const { return waiting_; }  // elements: gradients of operations that take no steps
  std::int64_t apart() const { return apart_; }      // elements: gradients that are kept apart
  std::int64_t scratch(int threads) const;           // elements, where so many work on a task
  double shared() const;                             // the part of a pass in operations that can use several threads

  // The second forms of weights lie behind them, at `packed + packing().total`.
  std::int64_t packed_size() const { return packing_.total + turned_; }
  void pack(const R* const* parameters, R* packed) const;
  void unpack(const R* packed, R* const* tensors) const;  // the differentiated ones, but for those kept apart

  // Calls on this tape, and on what all passes share. `own` holds this task's adapted weights, packed, `shared` all weights as pack leaves them.
  // So many threads may work on a call.
  Calls<R> bind(R* tape, R* once, const R* own, const R* shared, const Gradients<R>& to, int threads) const;
  // Calls of a Hessian-vector product along u, packed like the adapted parameters; of all differentiated parameters.
  TangentCalls<R> bind_tangent(R* tangent, const R* u, const Gradients<R>& to) const;
  // Tells calls that collect a weight what has passed before and after them: `support` and `tangents` hold one set of
  // calls a step (no tangents in first order), `rates` one a step and parameter, `row` of them a step.
  std::vector<std::vector<Past<R>>> remember(std::vector<Calls<R>>& support, std::vector<TangentCalls<R>>& tangents,
                                             Calls<R>& query, const R* rates, std::int64_t row) const;
  bool collects() const;
  // Of the query's plan: adds the gradients of collected weights to `gradient`, packed like weights, or writes them.
  void collect(const Calls<R>& query, bool adds, R* gradient, R* scratch) const;

  // Gradients that are kept apart, into the whole ones: of no task, or with those of one more.
  void clear_apart(R* const* gradients) const;
  void spread(const Calls<R>& calls, R* const* gradients) const;

  // Fills in the addresses of a task's data, and of parameters that are read where the caller has them.
  void aim(Calls<R>& calls, const std::vector<Leaf>& data, std::int64_t task, const R* const* parameters) const;

  // The sweeps; a watch takes the laps of their maps, where there is one.
  // Runs the objective, or what another pass over the same data changes; its loss is returned.
  R forward(const Calls<R>& calls, bool again, R* scratch, Stopwatch* watch) const;
  // Gradient of d_loss times the loss; not of what only operations that run once depend on.
  void backward(R* tape, R* once, const Calls<R>& calls, R d_loss, R* scratch, Stopwatch* watch) const;
  // Derivative of that gradient (with d_loss = 1, all differentiated parameters but those of operations that run once).
  void hessian_product(R* tangent, const Calls<R>& calls, const TangentCalls<R>& tangents, R* scratch,
                       Stopwatch* watch) const;
  // To parameters of operations that run once the products' derivatives are linear in the cotangents that all products
  // send there. `send` subtracts those of one product, times its rate, from what others have sent; `backward_once` is
  // the sweep for all of them.
  bool sends() const;
  void send(R* once, const R* tangent, R rate, bool first) const;
  void backward_once(R* tape, R* once, const Calls<R>& calls, R* scratch, Stopwatch* watch) const;

  // The value that the caller may ask for, rows that lie output_row apart.
  const R* output(const R* tape) const { return tape + slots_[program_.output].y; }
  std::int64_t output_row(std::int64_t columns) const {
    return columns + (row_unit_ - columns % row_unit_) % row_unit_;
  }

 private:
  // Of a value: where it and its cotangent lie on the tape, and their derivatives beside.
  struct Slot {
    std::int64_t y, dy, y_dot, dy_dot, size;
    bool varies, active;  // depends on adapted weights; on any weight whose gradient is wanted
    bool once;            // y and dy lie where all passes share
    bool sent;            // what varies reads it, and what runs once made it
    int maker;            // operation
    std::vector<int> readers;
  };
  struct Item {
    const Operation* operation;
    const void* shape;
    Maps<R> maps;
    Sizes sizes;
    std::int64_t saved, saved_dot, turned, apart;
    std::int64_t waiting[max_weights];  // of those gradients that may have to wait
    bool varies, active, once;
    bool collects;  // w[0] of a task is never formed
    bool spreads;   // dw[0] is kept apart
    bool adds[max_inputs];  // to the cotangent that a later reader of the input has written
  };

  void share_cotangents();
  void find_places(bool kept);
  Step<R> step_of(const Item& item, const Gradients<R>& to) const;
  // Where the map writes the gradient of w[i], number q; step.to[i] is set where it only waits there.
  R* gradient_of(const Item& item, int i, const Gradients<R>& to, Step<R>& step) const;
  void take_steps(const Item& item, const Step<R>& step, R* const* dw) const;
  void add_cotangents(const Item& item, R* memory, R* once, const std::int64_t* aside,
                      std::int64_t Slot::*cotangent) const;

  const Program& program_;
  const packed::Kernels<R>& kernels_;
  Packing packing_;
  std::vector<Slot> slots_;
  std::vector<Item> items_;
  std::int64_t tape_ = 0, once_ = 0, tangent_ = 0, turned_ = 0, waiting_ = 0, apart_ = 0;
  // Where what is added waits, on the tape and beside, and how long it is.
  std::int64_t aside_[max_inputs] = {}, aside_dot_[max_inputs] = {}, aside_size_[max_inputs] = {};
  std::int64_t row_unit_;  // elements of a vector, to whole ones of which rows are padded
};

}  // namespace fastmeta::executor
