// Single operations, from which the programs of executor_cases.h are made.
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
#include "../../csrc/kept_rows/kernels.h"
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

}  // namespace
