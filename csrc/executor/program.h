// A lowered program: a flat list of native operations over numbered values, parameters and data.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../common/isa.h"
#include "operation.h"

namespace fastmeta::executor {

constexpr int absent = -1;

// Where an operation's input comes from.
struct Source {
  bool is_data = false;
  int index = absent;  // of a value or of a data tensor
};

struct Operation {
  std::shared_ptr<const void> shape;
  Maps<float> (*f32)(Isa);
  Maps<double> (*f64)(Isa);
  Source x[max_inputs];
  int target = absent;  // data tensor, for losses and for operations on some of the rows
  int w[max_weights] = {absent, absent, absent, absent, absent, absent};
  int y = absent;  // value
  // Of a loss of labels: `label_rows` of them, each in [0, classes) or `ignored`.
  std::int64_t classes = 0, label_rows = 0, ignored = 0;
  // Of a table: x[0] is data of so many whole numbers of 64 bits, each in [0, table_rows).
  std::int64_t table_rows = 0, numbers = 0;
};

// In execution order; the last operation is the loss. Parameters are numbered: first those that adapt, then those that
// get a gradient all the same, then the others and the buffers.
struct Program {
  std::vector<Operation> operations;
  int values = 0;
  int output = absent;  // value, if the caller may ask for it
  int adapted = 0, differentiated = 0, parameters = 0;  // each count includes the one before
};

template <class R>
Maps<R> maps_of(const Operation& operation, Isa isa);
template <>
inline Maps<float> maps_of<float>(const Operation& operation, Isa isa) {
  return operation.f32(isa);
}
template <>
inline Maps<double> maps_of<double>(const Operation& operation, Isa isa) {
  return operation.f64(isa);
}

}  // namespace fastmeta::executor
