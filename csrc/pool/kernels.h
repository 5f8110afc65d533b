// Pooling of images that no convolution takes along.
#pragma once

#include "../common/isa.h"
#include "../conv_block/kernels.h"
#include "../executor/operation.h"

namespace fastmeta::pool {

// A convolutional block's pooling (with `pool` other than none) of its `n` images of `out` channels; its convolution is
// that of one pixel and is left out.
typedef conv_block::Shape Shape;

struct Table {
  bool (*supported)(const Shape&);  // whether the maps below may be called
  executor::Maps<float> f32;
  executor::Maps<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::pool
