// An operation without kernels: its maps are a function of the caller's, which is handed a task's memory.
#pragma once

#include <cstdint>
#include <functional>

#include "../common/isa.h"
#include "../executor/operation.h"

namespace fastmeta::callback {

enum class Map { forward, backward, tangent, tangent_backward };

// Null where there is nothing, or where nothing is wanted.
struct Buffer {
  const void* address;
  std::int64_t bytes;
};

// Of one call: what a map reads, and what it fills, padding included.
//   forward            reads x, w, fills y
//   backward           reads y (the cotangent), fills x, w (cotangents)
//   tangent            reads x, w (tangents), fills y
//   tangent_backward   reads y, y_dot (the cotangent and its tangent), fills x, w (tangents of cotangents)
// The weights lie packed: contiguous, padded to whole vectors.
struct Buffers {
  const void* key;  // the same for the maps of one call, and no other call's at the same time
  std::int64_t item;  // bytes of an element
  Buffer y, y_dot;
  Buffer x[executor::max_inputs], w[executor::max_weights];
};

struct Shape {
  std::int64_t rows, features;  // of the result
  std::int64_t x_rows[executor::max_inputs], x_features[executor::max_inputs];  // of values
  std::int64_t x_bytes[executor::max_inputs];                                   // of a task's data; 0 for values
  std::int64_t weights[executor::max_weights];                                  // elements, 0 where there is none
  std::function<void(Map, const Buffers&)> call;                                // by any thread; must not throw
};

struct Table {
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::callback
