// A perceptron's gradient, as a forward pass of PyTorch's has left it: its check, and its pull-back.
#pragma once

#include <cstdint>

#include "../common/curve_names.h"
#include "../common/isa.h"

namespace fastmeta::perceptron {

constexpr int max_layers = 32;

struct Layer {
  std::int64_t in, out;
  bool bias;
  Activation activation;  // identity, relu, tanh or sigmoid: their derivatives are functions of their results
};

enum class Loss : std::int32_t { squared_error, cross_entropy };

struct Net {
  const Layer* layers;  // the first one first
  int depth;
  std::int64_t rows;
  Loss loss;
  bool mean;             // of squares, or of rows that are not ignored; else the sum
  std::int64_t ignored;  // label
};

// Elements from one row to the next in what calls leave for each other: whole vectors of every instruction set.
template <class R>
constexpr std::int64_t row_of(std::int64_t features) {
  constexpr std::int64_t unit = 64 / sizeof(R);
  return (features + unit - 1) / unit * unit;
}

// Elements of dL/dz of all layers, one layer's behind the other's.
template <class R>
std::int64_t kept(const Net& net) {
  std::int64_t total = 0;
  for (int l = 0; l < net.depth; ++l) total += net.rows * row_of<R>(net.layers[l].out);
  return total;
}

// What a forward pass has left, rows behind each other without gaps.
template <class R>
struct Passed {
  const R* inputs[max_layers];   // of every layer, [rows, in]
  const R* weights[max_layers];  // [out, in]
  const R* last;                 // the last activation's result, [rows, out]; null where there is none
  const R* out;                  // what the loss compares, [rows, out]; of a cross entropy its log probabilities
  const void* target;            // numbers [rows, out], or labels [rows] of 64 bits
};

// One tensor for each weight and, behind it, each bias, as the parameters lie; null where there is none.
template <class R>
using Parameters = R* [2 * max_layers];

template <class R>
struct Cotangents {
  Parameters<const R> along;  // null where it is zero
  Parameters<R> results;
  bool steps;  // results are along - rate * (the product of the second derivative with along), else that product
  R rate;
};

template <class R>
struct Kernels {
  std::int64_t (*workspace)(const Net&);  // elements that the others need
  // Writes dL/dz; whether `gradients` are what follows from it.
  bool (*descend)(const Net&, const Passed<R>&, const Parameters<const R>& gradients, R* ds, R* workspace);
  void (*pull_back)(const Net&, const Passed<R>&, const R* ds, const Cotangents<R>&, R* workspace);
};

struct Table {
  Kernels<float> f32;
  Kernels<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::perceptron
