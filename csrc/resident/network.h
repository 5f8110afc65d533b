// What is asked of the resident executor: a chain of linear layers with a loss, and the kind of meta-step.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/curve_names.h"

namespace fastmeta::resident {

constexpr int most_layers = 24;  // their description travels with the launch, in 4 KiB of arguments
constexpr int absent = -1;

enum class Loss : std::int32_t { squared_error, cross_entropy, binary_cross_entropy };

// y = f(x W^T + b) with W [out, in]; weight and bias are numbers of parameters.
struct Linear {
  int in, out;
  Activation activation;
  double negative_slope;  // of leaky_relu
  int weight, bias;       // bias absent where there is none
};

struct Network {
  std::vector<Linear> layers;
  Loss loss;
  bool mean;             // of all numbers, of all rows that count; otherwise the sum
  std::int64_t ignored;  // label of rows that do not count
  int support, query;    // rows of one task's sets
};

// Parameters are numbered: those that adapt first, then others with a gradient, then the rest.
struct Kind {
  int steps;
  bool gradient, second_order, learned;  // learned: the rates get a gradient, too
  int rate_rows, rate_columns;           // of alpha: one or one a step, one or one a parameter
  int adapted, differentiated;
};

}  // namespace fastmeta::resident
