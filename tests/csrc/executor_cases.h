// Small programs of every operation, as the native executor is given them.
#pragma once

#include <memory>
#include <vector>

#include "executor_operations.h"

namespace {

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

// On some rows of two sequences alone, which data 2 lists, `attending` between residual rows, normalised.
Program kept(std::int64_t n) {
  const auto move = [n](bool back, int x, int y) {
    Operation operation;
    operation.shape = std::make_shared<kept_rows::Shape>(kept_rows::Shape{n, 6, 2, back});
    FASTMETA_MAPS(operation, kept_rows)
    operation.x[0] = {false, x};
    operation.y = y;
    return operation;
  };
  const auto among = [](Operation operation, auto shape) {
    shape.sequences = 2;
    operation.shape = std::make_shared<decltype(shape)>(shape);
    return operation;
  };
  const auto layer = [&](Activation activation, int w, int y) {
    const Operation whole = linear(n, 6, 6, activation, {false, 1}, w, y);
    return among(whole, *static_cast<const linear_block::Shape*>(whole.shape.get()));
  };
  Program p = attending(n);
  Operation attention = p.operations[3];
  for (int i = 0; i < 3; ++i) attention.x[i].index = 2 + i;
  attention.y = 5;
  const Operation residual = sum(n, 6, Activation::silu, 5, 1, 6);
  const norm::Shape rows_of{n, 1, 6, 1, 1e-5, Activation::gelu, 0, true, true, false, 2};
  p.operations = {linear(n, features, 6, Activation::tanh, {true, 0}, 0, 0), move(false, 0, 1),
                  layer(Activation::tanh, 2, 2), layer(Activation::gelu, 4, 3), layer(Activation::identity, 6, 4),
                  attention, among(residual, *static_cast<const pointwise::Shape*>(residual.shape.get())),
                  norm_of(rows_of, 6, 8, 7), move(true, 7, 8),
                  linear(n, 6, classes, Activation::identity, {false, 8}, 10, 9),
                  loss_of(loss::Kind::cross_entropy, n, 9, 10)};
  for (int i = 1; i < 9; ++i) p.operations[i].target = 2;
  p.values = 11;
  p.output = 9;
  p.adapted = p.differentiated = p.parameters = 12;
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
    {"kept rows", kept, {features * 6, 6, 36, 6, 36, 6, 36, 6, 6, 6, 6 * classes, classes}, features, true},
    {"embedding", embedded, {classes * hidden, hidden * classes, classes}, features, true, 0, true, false},
    {"tables apart", tables_apart,
     {classes * hidden, hidden * classes, classes, hidden * hidden, hidden, classes * hidden, classes * hidden}, features,
     true, 0, true, false},
    {"convolutions", images, {108, 6, 6, 6, 270, 5, 5, 5, 60, 3}, 2 * side * side, true},
    {"running statistics", evaluation, {108, 6, 6, 6, 6, 6, 270, 5, 5, 5, 60, 3, 6, 6, 6, 6, 5, 5}, 2 * side * side,
     true, 6},
};

}  // namespace
