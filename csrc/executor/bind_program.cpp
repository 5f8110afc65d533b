#include "bind_program.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/curve_of.h"
#include "../attention/kernels.h"
#include "../callback/kernels.h"
#include "../conv_block/kernels.h"
#include "../data/kernels.h"
#include "../embedding/kernels.h"
#include "../flatten/kernels.h"
#include "../kept_rows/kernels.h"
#include "../linear_block/kernels.h"
#include "../loss/kernels.h"
#include "../norm/kernels.h"
#include "../pointwise/kernels.h"
#include "../pool/kernels.h"

namespace py = pybind11;

namespace fastmeta::executor {
namespace {

loss::Kind loss_of(const std::string& name) {
  static const std::map<std::string, loss::Kind> names{{"squared_error", loss::Kind::squared_error},
                                                       {"cross_entropy", loss::Kind::cross_entropy},
                                                       {"binary_cross_entropy", loss::Kind::binary_cross_entropy}};
  return names.at(name);
}

template <class T>
T get(const py::dict& d, const char* key) {
  return d[key].cast<T>();
}

// Of operations on rows: how many sequences have them, where a list says which are kept; else none.
std::int64_t sequences_of(const py::dict& d) { return d.contains("sequences") ? get<std::int64_t>(d, "sequences") : 0; }

void describe_linear(const py::dict& d, Operation& operation) {
  auto shape = std::make_shared<linear_block::Shape>();
  shape->n = get<std::int64_t>(d, "n");
  shape->in = get<std::int64_t>(d, "in");
  shape->out = get<std::int64_t>(d, "out");
  shape->sequences = sequences_of(d);
  shape->activation = activation_of(get<std::string>(d, "activation"));
  shape->slope = get<double>(d, "slope");
  shape->bias = operation.w[1] != absent;
  shape->data = operation.x[0].is_data;
  operation.shape = shape;
  if (get<bool>(d, "gram")) {
    shape->support = get<std::int64_t>(d, "support");
    shape->query = get<std::int64_t>(d, "query");
    shape->asks = get<bool>(d, "asks");
    operation.f32 = [](Isa isa) { return linear_block::table_of(isa).gram32; };
    operation.f64 = [](Isa isa) { return linear_block::table_of(isa).gram64; };
    return;
  }
  operation.f32 = [](Isa isa) { return linear_block::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return linear_block::table_of(isa).f64; };
}

void describe_loss(const py::dict& d, Operation& operation) {
  auto shape = std::make_shared<loss::Shape>();
  shape->kind = loss_of(get<std::string>(d, "kind"));
  shape->n = get<std::int64_t>(d, "n");
  shape->features = get<std::int64_t>(d, "features");
  shape->mean = get<bool>(d, "mean");
  shape->ignored = get<std::int64_t>(d, "ignored");
  if (shape->kind == loss::Kind::cross_entropy) {
    operation.classes = shape->features;
    operation.label_rows = shape->n;
    operation.ignored = shape->ignored;
  }
  operation.shape = shape;
  operation.f32 = [](Isa isa) { return loss::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return loss::table_of(isa).f64; };
}

void describe_flatten(const py::dict& d, Operation& operation) {
  auto shape = std::make_shared<flatten::Shape>();
  shape->n = get<std::int64_t>(d, "n");
  shape->channels = get<std::int64_t>(d, "channels");
  shape->pixels = get<std::int64_t>(d, "pixels");
  operation.shape = shape;
  operation.f32 = [](Isa isa) { return flatten::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return flatten::table_of(isa).f64; };
}

void describe_kept_rows(const py::dict& d, Operation& operation) {
  auto shape = std::make_shared<kept_rows::Shape>();
  shape->n = get<std::int64_t>(d, "n");
  shape->features = get<std::int64_t>(d, "features");
  shape->sequences = sequences_of(d);
  shape->back = get<bool>(d, "back");
  operation.shape = shape;
  operation.f32 = [](Isa isa) { return kept_rows::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return kept_rows::table_of(isa).f64; };
}

void describe_data(const py::dict& d, Operation& operation) {
  auto shape = std::make_shared<data::Shape>();
  shape->n = get<std::int64_t>(d, "n");
  shape->channels = get<std::int64_t>(d, "channels");
  shape->pixels = get<std::int64_t>(d, "pixels");
  operation.shape = shape;
  operation.f32 = [](Isa isa) { return data::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return data::table_of(isa).f64; };
}

void describe_pointwise(const py::dict& d, Operation& operation) {
  auto shape = std::make_shared<pointwise::Shape>();
  shape->rows = get<std::int64_t>(d, "rows");
  shape->features = get<std::int64_t>(d, "features");
  shape->sequences = sequences_of(d);
  int i = 0;
  for (const double factor : get<std::vector<double>>(d, "factors")) shape->factors[i++] = factor;
  shape->activation = activation_of(get<std::string>(d, "activation"));
  shape->slope = get<double>(d, "slope");
  operation.shape = shape;
  operation.f32 = [](Isa isa) { return pointwise::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return pointwise::table_of(isa).f64; };
}

void describe_norm(const py::dict& d, Operation& operation) {
  auto shape = std::make_shared<norm::Shape>();
  shape->samples = get<std::int64_t>(d, "samples");
  shape->pixels = get<std::int64_t>(d, "pixels");
  shape->channels = get<std::int64_t>(d, "channels");
  shape->groups = get<std::int64_t>(d, "groups");
  shape->sequences = sequences_of(d);
  shape->eps = get<double>(d, "eps");
  shape->activation = activation_of(get<std::string>(d, "activation"));
  shape->slope = get<double>(d, "slope");
  shape->weight = operation.w[0] != absent;
  shape->bias = operation.w[1] != absent;
  shape->running = operation.w[2] != absent;
  operation.shape = shape;
  operation.f32 = [](Isa isa) { return norm::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return norm::table_of(isa).f64; };
}

void pair_of(const py::dict& d, const char* key, std::int64_t (&out)[2]) {
  const auto [rows, columns] = get<std::pair<std::int64_t, std::int64_t>>(d, key);
  out[0] = rows;
  out[1] = columns;
}

Pooling pooling_of(const py::dict& d) {
  static const std::map<std::string, Pool> kinds{{"none", Pool::none}, {"max", Pool::max}, {"average", Pool::average}};
  Pooling pool{};
  pool.kind = kinds.at(get<std::string>(d, "pool"));
  pair_of(d, "pool_kernel", pool.kernel);
  pair_of(d, "pool_stride", pool.stride);
  pair_of(d, "pool_padding", pool.padding);
  return pool;
}

void describe_pool(const py::dict& d, Operation& operation) {
  auto shape = std::make_shared<pool::Shape>();
  shape->n = get<std::int64_t>(d, "n");
  shape->channels = get<std::int64_t>(d, "channels");
  shape->height = get<std::int64_t>(d, "height");
  shape->width = get<std::int64_t>(d, "width");
  shape->pool = pooling_of(d);
  if (!pool::table_of(isa_in_use()).supported(*shape))
    throw std::invalid_argument("pool: these windows have no native kernel");
  operation.shape = shape;
  operation.f32 = [](Isa isa) { return pool::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return pool::table_of(isa).f64; };
}

void describe_conv(const py::dict& d, Operation& operation) {
  using conv_block::Norm;
  static const std::map<std::string, Norm> norms{
      {"none", Norm::none}, {"batch", Norm::batch}, {"running", Norm::running}};
  auto shape = std::make_shared<conv_block::Shape>();
  shape->n = get<std::int64_t>(d, "n");
  shape->in = get<std::int64_t>(d, "in");
  shape->height = get<std::int64_t>(d, "height");
  shape->width = get<std::int64_t>(d, "width");
  shape->out = get<std::int64_t>(d, "out");
  pair_of(d, "kernel", shape->kernel);
  pair_of(d, "stride", shape->stride);
  pair_of(d, "padding", shape->padding);
  pair_of(d, "dilation", shape->dilation);
  shape->groups = get<std::int64_t>(d, "groups");
  shape->pool = pooling_of(d);
  shape->eps = get<double>(d, "eps");
  shape->slope = get<double>(d, "slope");
  shape->norm = norms.at(get<std::string>(d, "norm"));
  shape->activation = activation_of(get<std::string>(d, "activation"));
  shape->bias = operation.w[1] != absent;
  shape->affine = operation.w[2] != absent;
  shape->data = operation.x[0].is_data;
  if (!conv_block::table_of(isa_in_use()).supported(*shape))
    throw std::invalid_argument("conv_block: this convolution, normalisation or pooling has no native kernel");
  operation.shape = shape;
  operation.f32 = [](Isa isa) { return conv_block::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return conv_block::table_of(isa).f64; };
}

void describe_embedding(const py::dict& d, Operation& operation) {
  auto shape = std::make_shared<embedding::Shape>();
  shape->count = get<std::int64_t>(d, "count");
  shape->rows = get<std::int64_t>(d, "rows");
  shape->features = get<std::int64_t>(d, "features");
  shape->padding = get<std::int64_t>(d, "padding");
  operation.table_rows = shape->rows;
  operation.numbers = shape->count;
  operation.shape = shape;
  if (get<bool>(d, "apart")) {
    operation.f32 = [](Isa isa) { return embedding::table_of(isa).apart32; };
    operation.f64 = [](Isa isa) { return embedding::table_of(isa).apart64; };
    return;
  }
  operation.f32 = [](Isa isa) { return embedding::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return embedding::table_of(isa).f64; };
}

void describe_attention(const py::dict& d, Operation& operation) {
  auto shape = std::make_shared<attention::Shape>();
  shape->n = get<std::int64_t>(d, "n");
  shape->rows = get<std::int64_t>(d, "rows");
  shape->columns = get<std::int64_t>(d, "columns");
  shape->heads = get<std::int64_t>(d, "heads");
  shape->dim = get<std::int64_t>(d, "dim");
  shape->scale = get<double>(d, "scale");
  const auto mask = get<std::vector<std::int64_t>>(d, "mask");
  shape->masked = !mask.empty();
  shape->boolean = get<bool>(d, "boolean");
  shape->causal = get<bool>(d, "causal");
  shape->safe = get<bool>(d, "safe");
  std::copy(mask.begin(), mask.end(), shape->mask);
  operation.shape = shape;
  operation.f32 = [](Isa isa) { return attention::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return attention::table_of(isa).f64; };
}

py::object view_of(const callback::Buffer& buffer) {
  if (buffer.address == nullptr) return py::none();
  return py::memoryview::from_memory(const_cast<void*>(buffer.address), buffer.bytes);
}

template <std::size_t n>
py::tuple views_of(const callback::Buffer (&buffers)[n]) {
  py::tuple views(n);
  for (std::size_t i = 0; i < n; ++i) views[i] = view_of(buffers[i]);
  return views;
}

void describe_callback(const py::dict& d, Operation& operation) {
  auto shape = std::make_shared<callback::Shape>();
  shape->rows = get<std::int64_t>(d, "rows");
  shape->features = get<std::int64_t>(d, "features");
  const auto copy = [&](const char* key, std::int64_t* to) {
    const auto values = get<std::vector<std::int64_t>>(d, key);
    std::copy(values.begin(), values.end(), to);
  };
  copy("x_rows", shape->x_rows);
  copy("x_features", shape->x_features);
  copy("x_bytes", shape->x_bytes);
  copy("weights", shape->weights);
  // Threads of the executor's call it, and none of them has the interpreter's lock then.
  const std::shared_ptr<py::object> function(new py::object(d["call"]), [](py::object* held) {
    const py::gil_scoped_acquire lock;
    delete held;
  });
  shape->call = [function](callback::Map map, const callback::Buffers& b) {
    const py::gil_scoped_acquire lock;
    try {
      (*function)(static_cast<int>(map), reinterpret_cast<std::uintptr_t>(b.key), view_of(b.y), view_of(b.y_dot),
                  views_of(b.x), views_of(b.w));
    } catch (py::error_already_set& error) {  // it keeps its errors itself, but the interpreter may be ending
      error.discard_as_unraisable("fastmeta's native executor");
    }
  };
  operation.shape = shape;
  operation.f32 = [](Isa isa) { return callback::table_of(isa).f32; };
  operation.f64 = [](Isa isa) { return callback::table_of(isa).f64; };
}

Operation operation_of(const py::dict& d) {
  Operation operation;
  int i = 0;
  for (const auto& [is_data, index] : get<std::vector<std::pair<bool, int>>>(d, "x"))
    operation.x[i++] = {is_data, index};
  i = 0;  // the last ones may be left out
  for (const int w : get<std::vector<int>>(d, "w")) operation.w[i++] = w;
  operation.target = get<int>(d, "target");
  operation.y = get<int>(d, "y");
  const auto name = get<std::string>(d, "operation");
  if (name == "linear_block") describe_linear(d, operation);
  else if (name == "conv_block") describe_conv(d, operation);
  else if (name == "flatten") describe_flatten(d, operation);
  else if (name == "data") describe_data(d, operation);
  else if (name == "norm") describe_norm(d, operation);
  else if (name == "pool") describe_pool(d, operation);
  else if (name == "pointwise") describe_pointwise(d, operation);
  else if (name == "loss") describe_loss(d, operation);
  else if (name == "embedding") describe_embedding(d, operation);
  else if (name == "attention") describe_attention(d, operation);
  else if (name == "kept_rows") describe_kept_rows(d, operation);
  else if (name == "callback") describe_callback(d, operation);
  else throw std::invalid_argument("executor: operation must be one of csrc's, got " + name);
  return operation;
}

}  // namespace

Program program_of(const py::dict& d) {
  Program program;
  for (const py::handle& item : d["operations"]) program.operations.push_back(operation_of(item.cast<py::dict>()));
  program.values = get<int>(d, "values");
  program.output = get<int>(d, "output");
  program.adapted = get<int>(d, "adapted");
  program.differentiated = get<int>(d, "differentiated");
  program.parameters = get<int>(d, "parameters");
  return program;
}

}  // namespace fastmeta::executor
