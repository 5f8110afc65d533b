// Small programs of every operation, as the native executor is given them.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "../../csrc/attention/kernels.h"
#include "../../csrc/callback/kernels.h"
#include "../../csrc/conv_block/kernels.h"
#include "../../csrc/data/kernels.h"
#include "../../csrc/embedding/kernels.h"
#include "../../csrc/executor/program.h"
#include "../../csrc/flatten/kernels.h"
#include "../../csrc/linear_block/kernels.h"
#include "../../csrc/loss/kernels.h"
#include "../../csrc/norm/kernels.h"
#include "../../csrc/pointwise/kernels.h"
#include "../../csrc/pool/kernels.h"

namespace {

using namespace fastmeta;
using namespace fastmeta::executor;

#define FASTMETA_MAPS(operation, space)                                      \
  operation.f32 = [](Isa isa) { return space::table_of(isa).f32; };          \
  operation.f64 = [](Isa isa) { return space::table_of(isa).f64; };

constexpr int tasks = 7;
constexpr std::int64_t steps = 3, features = 5, hidden = 19, classes = 3, side = 9;

Operation linear(std::int64_t n, std::int64_t in, std::int64_t out, Activation activation, Source x, int w, int y) {
  Operation operation;
  auto shape = std::make_shared<linear_block::Shape>();
  *shape = {n, in, out, activation, 0.1, true, x.is_data, 0, 0, false};
  operation.shape = shape;
  FASTMETA_MAPS(operation, linear_block)
  operation.x[0] = x;
  operation.w[0] = w;
  operation.w[1] = w + 1;
  operation.y = y;
  return operation;
}

// The first layer of `rows`, its weight collected. Support sets have 4 rows, query sets 6.
Operation gram(std::int64_t n, std::int64_t in, std::int64_t out, Activation activation, Source x, int w, int y) {
  Operation operation = linear(n, in, out, activation, x, w, y);
  auto shape = std::make_shared<linear_block::Shape>(*static_cast<const linear_block::Shape*>(operation.shape.get()));
  shape->support = 4;
  shape->query = 6;
  shape->asks = n == 6;
  operation.shape = shape;
  operation.f32 = [](Isa isa) { return linear_block::table_of(isa).gram32; };
  operation.f64 = [](Isa isa) { return linear_block::table_of(isa).gram64; };
  return operation;
}

Operation loss_of(loss::Kind kind, std::int64_t n, int x, int y) {
  Operation operation;
  auto shape = std::make_shared<loss::Shape>();
  *shape = {kind, n, classes, true, -100};
  operation.shape = shape;
  FASTMETA_MAPS(operation, loss)
  operation.x[0] = {false, x};
  operation.target = 1;
  operation.y = y;
  if (kind == loss::Kind::cross_entropy) {
    operation.classes = classes;
    operation.label_rows = n;
    operation.ignored = -100;
  }
  return operation;
}

Operation conv(std::int64_t n, std::int64_t in, std::int64_t size, std::int64_t out, Source x, int w, int y,
               int statistics = absent) {
  Operation operation;
  auto shape = std::make_shared<conv_block::Shape>();
  *shape = {n, in, size, size, out, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, {Pool::average, {2, 2}, {2, 2}, {0, 0}}, 1e-5,
            0.1, statistics == absent ? conv_block::Norm::batch : conv_block::Norm::running, Activation::tanh, true,
            true, x.is_data};
  operation.shape = shape;
  FASTMETA_MAPS(operation, conv_block)
  operation.x[0] = x;
  for (int i = 0; i < 4; ++i) operation.w[i] = w + i;
  for (int i = 0; i < 2; ++i) operation.w[4 + i] = statistics == absent ? absent : statistics + i;
  operation.y = y;
  return operation;
}

Operation flat(std::int64_t n, std::int64_t channels, std::int64_t pixels, int x, int y) {
  Operation operation;
  auto shape = std::make_shared<flatten::Shape>();
  *shape = {n, channels, pixels};
  operation.shape = shape;
  FASTMETA_MAPS(operation, flatten)
  operation.x[0] = {false, x};
  operation.y = y;
  return operation;
}

Operation data_of(std::int64_t n, std::int64_t channels, std::int64_t pixels, int y) {
  Operation operation;
  auto shape = std::make_shared<data::Shape>();
  *shape = {n, channels, pixels};
  operation.shape = shape;
  FASTMETA_MAPS(operation, data)
  operation.x[0] = {true, 0};
  operation.y = y;
  return operation;
}

Operation sum(std::int64_t rows, std::int64_t channels, Activation activation, int a, int b, int y) {
  Operation operation;
  auto shape = std::make_shared<pointwise::Shape>();
  *shape = {rows, channels, {1, -0.7}, activation, 0.1};
  operation.shape = shape;
  FASTMETA_MAPS(operation, pointwise)
  operation.x[0] = {false, a};
  operation.x[1] = {false, b};
  operation.y = y;
  return operation;
}

Operation norm_of(norm::Shape given, int x, int w, int y, int statistics = absent) {
  Operation operation;
  given.eps = 1e-5;
  given.slope = 0.1;
  given.weight = given.bias = w != absent;
  given.running = statistics != absent;
  auto shape = std::make_shared<norm::Shape>(given);
  operation.shape = shape;
  FASTMETA_MAPS(operation, norm)
  operation.x[0] = {false, x};
  if (w != absent) operation.w[0] = w;
  if (w != absent) operation.w[1] = w + 1;
  for (int i = 0; i < 2; ++i) operation.w[2 + i] = statistics == absent ? absent : statistics + i;
  operation.y = y;
  return operation;
}

Operation pool_of(std::int64_t n, std::int64_t channels, std::int64_t size, Pool kind, std::int64_t window, int x,
                  int y) {
  Operation operation;
  auto shape = std::make_shared<pool::Shape>();
  *shape = {n, channels, size, size, {kind, {window, window}, {2, 2}, {0, 0}}};
  operation.shape = shape;
  FASTMETA_MAPS(operation, pool)
  operation.x[0] = {false, x};
  operation.y = y;
  return operation;
}

// y = w x^2, feature by feature, as a caller's function of the addresses it was given by earlier maps.
template <class R>
struct Squares {
  std::int64_t rows, features;
  callback::Buffers primal{}, tangent{};

  static R* at(const callback::Buffer& b) { return static_cast<R*>(const_cast<void*>(b.address)); }

  void operator()(callback::Map map, const callback::Buffers& b) const {
    using callback::Map;
    const std::int64_t row = b.y.bytes / static_cast<std::int64_t>(sizeof(R)) / rows;
    const R *x = at(primal.x[0]), *w = at(primal.w[0]), *x_dot = at(tangent.x[0]), *w_dot = at(tangent.w[0]);
    if (map == Map::backward || map == Map::tangent_backward)
      for (std::int64_t j = 0; j < features; ++j) at(b.w[0])[j] = 0;
    for (std::int64_t i = 0; i < rows * row; ++i) {
      const std::int64_t j = i % row;
      const bool padding = j >= features;
      const R v = padding ? 0 : x[i], s = padding ? 0 : w[j], d = padding ? 0 : at(b.y)[i];
      const R v_dot = x_dot == nullptr || padding ? 0 : x_dot[i], s_dot = w_dot == nullptr || padding ? 0 : w_dot[j];
      if (map == Map::forward) {
        at(b.y)[i] = s * v * v;
      } else if (map == Map::tangent) {
        at(b.y)[i] = s_dot * v * v + 2 * s * v * v_dot;
      } else {
        const bool second = map == Map::tangent_backward;
        const R d_dot = second && !padding ? at(b.y_dot)[i] : 0;
        at(b.x[0])[i] = second ? 2 * (s_dot * v + s * v_dot) * d + 2 * s * v * d_dot : 2 * s * v * d;
        if (!padding) at(b.w[0])[j] += second ? 2 * v * v_dot * d + v * v * d_dot : v * v * d;
      }
    }
  }
};

Operation squares_of(std::int64_t n, std::int64_t width, int x, int w, int y) {
  struct Kept {
    std::mutex mutex;
    std::map<const void*, std::pair<callback::Buffers, callback::Buffers>> calls;
  };
  Operation operation;
  auto shape = std::make_shared<callback::Shape>();
  *shape = {n, width, {n, 0}, {width, 0}, {0, 0}, {width}, {}};
  shape->call = [n, width, kept = std::make_shared<Kept>()](callback::Map map, const callback::Buffers& b) {
    std::unique_lock<std::mutex> lock(kept->mutex);
    auto& [primal, tangent] = kept->calls[b.key];
    if (map == callback::Map::forward) primal = b;
    if (map == callback::Map::tangent) tangent = b;
    const callback::Buffers x = primal, x_dot = map == callback::Map::backward ? callback::Buffers{} : tangent;
    lock.unlock();
    if (b.item == 4)
      Squares<float>{n, width, x, x_dot}(map, b);
    else
      Squares<double>{n, width, x, x_dot}(map, b);
  };
  operation.shape = shape;
  FASTMETA_MAPS(operation, callback)
  operation.x[0] = {false, x};
  operation.w[0] = w;
  operation.y = y;
  return operation;
}

struct Case {
  const char* name;
  Program (*program)(std::int64_t n);
  std::vector<std::int64_t> weights;  // elements of each parameter
  std::int64_t input;                 // elements of a sample
  bool labels;
  std::size_t constants = 0;  // the last parameters: running statistics
  bool learns = true;         // whether rates can be learned
  bool ignores = true;        // whether a label is one to be left out
};

Program rows(std::int64_t n, loss::Kind kind) {
  Program p;
  p.operations = {linear(n, features, hidden, Activation::silu, {true, 0}, 0, 0),
                  linear(n, hidden, hidden, Activation::tanh, {false, 0}, 2, 1),
                  linear(n, hidden, classes, Activation::identity, {false, 1}, 4, 2), loss_of(kind, n, 2, 3)};
  p.values = 4;
  p.output = 2;
  p.adapted = p.differentiated = p.parameters = 6;
  return p;
}

Program collected_rows(std::int64_t n) {
  Program p = rows(n, loss::Kind::cross_entropy);
  p.operations[0] = gram(n, features, hidden, Activation::silu, {true, 0}, 0, 0);
  return p;
}

Program images(std::int64_t n) {
  Program p;
  p.operations = {conv(n, 2, side, 6, {true, 0}, 0, 0), conv(n, 6, side / 2, 5, {false, 0}, 4, 1),
                  flat(n, 5, 4, 1, 2), linear(n, 20, classes, Activation::identity, {false, 2}, 8, 3),
                  loss_of(loss::Kind::cross_entropy, n, 3, 4)};
  p.values = 5;
  p.output = 3;
  p.adapted = p.differentiated = p.parameters = 10;
  return p;
}

// Layer norm before and group norm after, data and values that are read twice, a value added to itself.
Program residual_rows(std::int64_t n) {
  Program p;
  p.operations = {linear(n, features, hidden, Activation::identity, {true, 0}, 0, 0),
                  norm_of({n, 1, hidden, 1, 0, Activation::gelu, 0, false, false, false}, 0, 2, 1),
                  linear(n, hidden, hidden, Activation::silu, {false, 1}, 4, 2),
                  sum(n, hidden, Activation::sigmoid, 0, 2, 3),
                  norm_of({1, n, hidden, hidden, 0, Activation::identity, 0, false, false, false}, 3, absent, 4),
                  sum(n, hidden, Activation::identity, 4, 4, 5),
                  linear(n, hidden, features, Activation::tanh, {false, 5}, 6, 6),
                  data_of(n, features, 1, 7),
                  sum(n, features, Activation::tanh, 6, 7, 8),
                  linear(n, features, classes, Activation::identity, {false, 8}, 8, 9),
                  loss_of(loss::Kind::cross_entropy, n, 9, 10)};
  p.values = 11;
  p.output = 9;
  p.adapted = p.differentiated = p.parameters = 10;
  return p;
}

// A block of two channels a group beside a skip from the images, and pools of values.
Program residual_images(std::int64_t n) {
  Program p;
  const std::int64_t half = side / 2, pixels = half * half;
  p.operations = {conv(n, 2, side, 6, {true, 0}, 0, 0),
                  norm_of({n, pixels, 6, 3, 0, Activation::silu, 0, false, false, false}, 0, 4, 1),
                  data_of(n, 2, side * side, 2),
                  conv(n, 2, side, 6, {false, 2}, 6, 3),
                  sum(n * pixels, 6, Activation::leaky_relu, 1, 3, 4),
                  sum(n * pixels, 6, Activation::identity, 4, 1, 5),
                  pool_of(n, 6, half, Pool::max, 2, 5, 6),
                  pool_of(n, 6, half, Pool::average, 3, 4, 7),
                  norm_of({n, 1, 6, 1, 0, Activation::tanh, 0, false, false, false}, 7, 10, 8),
                  flat(n, 6, 4, 6, 9),
                  linear(n, 24, 6, Activation::identity, {false, 9}, 12, 10),
                  sum(n, 6, Activation::tanh, 10, 8, 11),
                  linear(n, 6, classes, Activation::identity, {false, 11}, 14, 12),
                  loss_of(loss::Kind::cross_entropy, n, 12, 13)};
  p.values = 14;
  p.output = 12;
  p.adapted = p.differentiated = p.parameters = 16;
  return p;
}

// One layer adapts. Its input, the same at every step, is read by others that do not, before and after it.
Program branches(std::int64_t n) {
  Program p;
  p.operations = {linear(n, features, hidden, Activation::silu, {true, 0}, 6, 0),
                  linear(n, hidden, hidden, Activation::tanh, {false, 0}, 0, 1),
                  linear(n, hidden, hidden, Activation::silu, {false, 0}, 2, 2),
                  sum(n, hidden, Activation::tanh, 1, 2, 3),
                  sum(n, hidden, Activation::identity, 3, 0, 4),
                  linear(n, hidden, classes, Activation::identity, {false, 4}, 4, 5),
                  loss_of(loss::Kind::cross_entropy, n, 5, 6)};
  p.values = 7;
  p.output = 5;
  p.adapted = 2;
  p.differentiated = p.parameters = 8;
  return p;
}

Program called_back(std::int64_t n) {
  Program p;
  p.operations = {linear(n, features, hidden, Activation::tanh, {true, 0}, 0, 0), squares_of(n, hidden, 0, 2, 1),
                  linear(n, hidden, classes, Activation::identity, {false, 1}, 3, 2),
                  loss_of(loss::Kind::cross_entropy, n, 2, 3)};
  p.values = 4;
  p.output = 2;
  p.adapted = p.differentiated = p.parameters = 5;
  return p;
}

// A weight so large that products copy it in panels, and threads share them.
constexpr std::int64_t large = 364;

Program large_rows(std::int64_t n) {
  Program p;
  p.operations = {linear(n, features, large, Activation::gelu, {true, 0}, 0, 0),
                  linear(n, large, large, Activation::tanh, {false, 0}, 2, 1),
                  linear(n, large, classes, Activation::identity, {false, 1}, 4, 2),
                  loss_of(loss::Kind::cross_entropy, n, 2, 3)};
  p.values = 4;
  p.output = 2;
  p.adapted = p.differentiated = p.parameters = 6;
  return p;
}

// Two samples of n / 2 tokens, two heads of three features; what is added to the scores are some of the task's data.
Program attending(std::int64_t n) {
  Operation attention;
  auto shape = std::make_shared<attention::Shape>();
  *shape = {2, n / 2, n / 2, 2, 3, 0.6, true, {1, 2, 0, 3}};
  attention.shape = shape;
  FASTMETA_MAPS(attention, attention)
  for (int i = 0; i < 3; ++i) attention.x[i] = {false, i};
  attention.x[3] = {true, 0};
  attention.y = 3;
  Program p;
  p.operations = {linear(n, features, 6, Activation::tanh, {true, 0}, 0, 0),
                  linear(n, features, 6, Activation::tanh, {true, 0}, 2, 1),
                  linear(n, features, 6, Activation::identity, {true, 0}, 4, 2),
                  attention,
                  linear(n, 6, classes, Activation::identity, {false, 3}, 6, 4),
                  loss_of(loss::Kind::cross_entropy, n, 4, 5)};
  p.values = 6;
  p.output = 4;
  p.adapted = p.differentiated = p.parameters = 8;
  return p;
}

// The task's labels are the numbers, too.
Program embedded(std::int64_t n) {
  Operation table;
  auto shape = std::make_shared<embedding::Shape>();
  *shape = {n, classes, hidden, -1};
  table.shape = shape;
  FASTMETA_MAPS(table, embedding)
  table.x[0] = {true, 1};
  table.w[0] = 0;
  table.y = 0;
  Program p;
  p.operations = {table, linear(n, hidden, classes, Activation::identity, {false, 0}, 1, 1),
                  loss_of(loss::Kind::cross_entropy, n, 1, 2)};
  p.values = 3;
  p.output = 1;
  p.adapted = p.differentiated = p.parameters = 3;
  return p;
}

// Tables that do not adapt, their gradients kept apart, one read for the first layer and one behind it; a table that
// adapts between them.
Program tables_apart(std::int64_t n) {
  const auto table = [n](int w, int y, bool apart) {
    Operation operation;
    auto shape = std::make_shared<embedding::Shape>();
    *shape = {n, classes, hidden, -1};
    operation.shape = shape;
    FASTMETA_MAPS(operation, embedding)
    if (apart) {
      operation.f32 = [](Isa isa) { return embedding::table_of(isa).apart32; };
      operation.f64 = [](Isa isa) { return embedding::table_of(isa).apart64; };
    }
    operation.x[0] = {true, 1};
    operation.w[0] = w;
    operation.y = y;
    return operation;
  };
  Program p;
  p.operations = {table(5, 0, true),
                  linear(n, hidden, hidden, Activation::tanh, {false, 0}, 3, 1),
                  table(0, 2, false),
                  sum(n, hidden, Activation::tanh, 1, 2, 3),
                  table(6, 4, true),
                  sum(n, hidden, Activation::identity, 3, 4, 5),
                  linear(n, hidden, classes, Activation::identity, {false, 5}, 1, 6),
                  loss_of(loss::Kind::cross_entropy, n, 6, 7)};
  p.values = 8;
  p.output = 6;
  p.adapted = 3;
  p.differentiated = p.parameters = 7;
  return p;
}

// Batch norm in evaluation mode, in a convolution and elsewhere.
Program evaluation(std::int64_t n) {
  Program p;
  const std::int64_t half = side / 2;
  p.operations = {conv(n, 2, side, 6, {true, 0}, 0, 0, 12),
                  norm_of({1, n * half * half, 6, 6, 0, Activation::silu, 0, false, false, false}, 0, 4, 1, 14),
                  conv(n, 6, half, 5, {false, 1}, 6, 2, 16),
                  flat(n, 5, 4, 2, 3),
                  linear(n, 20, classes, Activation::identity, {false, 3}, 10, 4),
                  loss_of(loss::Kind::cross_entropy, n, 4, 5)};
  p.values = 6;
  p.output = 4;
  p.adapted = 11;
  p.differentiated = 12;
  p.parameters = 18;
  return p;
}

const std::vector<std::int64_t> row_weights{features * hidden, hidden,           hidden * hidden,
                                            hidden,            hidden * classes, classes};

const Case cases[] = {
    {"cross entropy", [](std::int64_t n) { return rows(n, loss::Kind::cross_entropy); }, row_weights, features, true},
    {"squared error", [](std::int64_t n) { return rows(n, loss::Kind::squared_error); }, row_weights, features, false},
    {"binary cross entropy", [](std::int64_t n) { return rows(n, loss::Kind::binary_cross_entropy); }, row_weights,
     features, false},
    {"collected weight", collected_rows, row_weights, features, true, 0, false},
    {"residual rows", residual_rows,
     {features * hidden, hidden, hidden, hidden, hidden * hidden, hidden, hidden * features, features,
      features * classes, classes},
     features, true},
    {"residual images", residual_images,
     {108, 6, 6, 6, 6, 6, 108, 6, 6, 6, 6, 6, 144, 6, 18, 3}, 2 * side * side, true},
    {"branches", branches,
     {hidden * hidden, hidden, hidden * hidden, hidden, hidden * classes, classes, features * hidden, hidden}, features,
     true},
    {"called back", called_back, {features * hidden, hidden, hidden, hidden * classes, classes}, features, true},
    {"large weights", large_rows, {features * large, large, large * large, large, large * classes, classes}, features,
     true},
    {"attention", attending, {features * 6, 6, features * 6, 6, features * 6, 6, 6 * classes, classes}, features, true},
    {"embedding", embedded, {classes * hidden, hidden * classes, classes}, features, true, 0, true, false},
    {"tables apart", tables_apart,
     {classes * hidden, hidden * classes, classes, hidden * hidden, hidden, classes * hidden, classes * hidden}, features,
     true, 0, true, false},
    {"convolutions", images, {108, 6, 6, 6, 270, 5, 5, 5, 60, 3}, 2 * side * side, true},
    {"running statistics", evaluation, {108, 6, 6, 6, 6, 6, 270, 5, 5, 5, 60, 3, 6, 6, 6, 6, 5, 5}, 2 * side * side,
     true, 6},
};

}  // namespace
