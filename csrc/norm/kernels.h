// Normalisation by statistics of the input and the activation that follows: u = weight (z - mean) / s + bias, y = f(u).
//
// Statistics are of each sample and group of neighbouring channels, over their pixels. Layer norm of rows has one group
// and one pixel, instance norm as many groups as channels; batch norm is instance norm of a single sample whose pixels
// are those of all images. In evaluation mode its statistics are constants, those that ran along with the training.
#pragma once

#include <cstdint>

#include "../common/curve_names.h"
#include "../common/isa.h"
#include "../executor/operation.h"

namespace fastmeta::norm {

// Weights in order: weight, bias, running mean and running variance, each [channels]; the last two are constants.
struct Shape {
  std::int64_t samples, pixels, channels, groups;
  double eps;
  Activation activation;
  double slope;  // of leaky_relu below 0
  bool weight, bias;
  bool running;  // statistics are the running ones; one sample, as many groups as channels
  std::int64_t sequences = 0;  // whose rows the samples are, where a list says which are kept (common/kept_rows.h)
};

struct Table {
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::norm
