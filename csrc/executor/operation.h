// What a native operation gives the executor: its four maps for one task, over memory it is given. An operation may
// spread its work over the threads it is granted (common/threads.h) if results have the same bits for any number.
//
// Values between operations lie in one of two layouts, their last axis padded with zeros to whole vectors:
//   rows   [n, padded(features)]
//   images [n, height, width, padded(channels)]
// So do their cotangents and tangents. A task's data lie as the caller has them: contiguous, not padded, images as
// [n, channels, height, width].
//
// Fast weights lie packed, in whatever layout the operation likes best, for the whole inner loop: the executor packs
// the shared weights once a meta-step, updates packed weights with packed gradients, and unpacks the meta-gradient
// once. Padding of packed weights is zero, and so must be the padding of their gradients. Buffers, such as running
// statistics, are weights that neither vary nor get a gradient.
#pragma once

#include <cstdint>

namespace fastmeta::executor {

constexpr int max_inputs = 4;
constexpr int max_weights = 6;

// Numbers of elements.
struct Sizes {
  std::int64_t y;                     // the result
  std::int64_t saved;                 // what forward and backward leave for each other and the tangents, kept a step
  std::int64_t saved_dot;             // what tangent leaves for tangent_backward
  std::int64_t scratch;               // of any one map
  std::int64_t thread_scratch;        // beside, behind it, for each thread; 0 where the maps run on one thread
  std::int64_t weights[max_weights];  // packed; 0 where there is none
  std::int64_t turned;                // weights[0] in a second form, for cotangents; 0 where there is none
  std::int64_t apart;                 // dw[0], where gradients are kept apart; see Maps::spread
  bool rereads_x = true, rereads_y = true;  // whether backward reads x, and y
};

// A weight's gradient is wanted alone, or as a step along it, eq. (3) and (6): dw = from - rate * gradient. An
// operation that takes steps may find dw where w, w_dot or `from` lies, so that a task's weights or their adjoint need
// no second place: it writes a weight's gradient when it has read that weight for the last time. Others leave steps to
// the executor and give gradients always, which wait in a place of their own.
template <class R>
struct Step {
  const R* from[max_weights];  // packed; null where the gradient alone is wanted
  const R* rate[max_weights];
  R* to[max_weights];  // where the executor takes what waits in dw; null where it stays there
};

template <class R>
struct Primal;
template <class R>
struct Tangent;

// An inner step that has been taken, to an operation that holds its fast weight as the steps that made it.
template <class R>
struct Past {
  const Primal<R>* call;
  const Tangent<R>* tangent;  // filled in once the adjoint has passed the step; null in first order
  const R* rate;
};

// One operation at one inner step of one task. No buffer overlaps another, but as a Step says; all start at multiples
// of 64 bytes.
template <class R>
struct Primal {
  const R* x[max_inputs];
  // As the caller has them, of a loss: labels [n] of 64 bits or floats; of operations on rows: a list of those that are
  // kept (common/kept_rows.h), whose values then have all others' places behind them, of which nothing is read.
  const void* target;
  const R* w[max_weights];
  const R* turned;  // w[0] in its second form, where it is at hand: that of the shared weights
  R* y;
  R* saved;
  const R* dy;          // from here on for backward and the tangents
  R* dx[max_inputs];    // overwritten; null where it is not wanted
  R* dw[max_weights];   // overwritten; null where it is not wanted
  Step<R> step;
  int threads;          // that may work on this task
  const Past<R>* past;  // where w[0] is collected: the steps taken so far, the first one first
  std::int64_t taken;
};

// Derivatives of the above along a direction.
template <class R>
struct Tangent {
  const R* x_dot[max_inputs];   // null where the input does not vary
  const R* w_dot[max_weights];  // null where the weight does not vary
  R* y_dot;
  R* saved_dot;
  const R* dy_dot;
  R* dx_dot[max_inputs];   // overwritten; null where it is not wanted
  R* dw_dot[max_weights];  // overwritten; null where it is not wanted
  Step<R> step;
  // Where w[0] is collected, the direction is what the query's call and the steps that the adjoint has passed make it.
  const Primal<R>* query;
  const Past<R>* passed;
  std::int64_t passed_steps;
};

// Where tangent has not run, because nothing varies, saved_dot is zero in tangent_backward.
// `shape` points to the operation's own description. forward and tangent write y and y_dot, padding included.
template <class R>
struct Maps {
  std::int64_t width;  // elements of a vector
  Sizes (*sizes)(const void* shape);
  // Null where there are no weights.
  void (*pack)(const void* shape, int which, const R* tensor, R* packed);
  void (*unpack)(const void* shape, int which, const R* packed, R* tensor);
  void (*forward)(const void* shape, const Primal<R>&, R* scratch);
  void (*backward)(const void* shape, const Primal<R>&, R* scratch);
  void (*tangent)(const void* shape, const Primal<R>&, const Tangent<R>&, R* scratch);
  void (*tangent_backward)(const void* shape, const Primal<R>&, const Tangent<R>&, R* scratch);
  void (*turn)(const void* shape, const R* packed, R* turned) = nullptr;  // null where there is no second form
  bool takes_steps = false;
  // Not null where w[0] is never formed for a task: the maps are given the shared weight and the past, all of whose
  // values stay in place, and no dw[0]; this adds the gradient of the shared weight to dw, or writes it.
  void (*collect)(const void* shape, const Primal<R>& query, bool adds, R* dw, R* scratch) = nullptr;
  // Not null where w[0] does not adapt, and what a task's gradient has beside zeros is small: dw[0] then is kept apart
  // in a form of the operation's own, Sizes::apart elements, and this adds it to the whole gradient. The maps are given
  // w[0] as the caller has it, neither packed nor aligned, and so is the whole gradient.
  void (*spread)(const void* shape, const Primal<R>& call, const R* dw, R* gradient) = nullptr;
};

}  // namespace fastmeta::executor
