// A convolutional block: convolution, then normalisation, activation and pooling where asked for.
#pragma once

#include <cstdint>

#include "../common/curve_names.h"
#include "../common/isa.h"
#include "../common/pooling.h"
#include "../executor/operation.h"

namespace fastmeta::conv_block {

// By statistics of this batch of one task, or by running ones, which are constants.
enum class Norm : std::int32_t { none, batch, running };

// Weights in order: weight [out, in / groups, kernel_h, kernel_w], bias [out]; the norm's weight, bias, running mean
// and running variance, each [out], of which the last two are constants.
struct Shape {
  std::int64_t n, in, height, width, out;  // images of one task
  std::int64_t kernel[2], stride[2], padding[2], dilation[2], groups;
  Pooling pool;
  double eps, slope;
  Norm norm;
  Activation activation;
  bool bias, affine;
  bool data;  // the input is a task's data: [n, in, height, width], constant, without a gradient
};

struct Table {
  bool (*supported)(const Shape&);  // whether the maps below may be called
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::conv_block
