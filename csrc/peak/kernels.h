// What a processor does at its best, to be timed: multiply-adds that never leave the registers.
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace fastmeta::peak {

// `rounds` times x <- x a + b for as many x as the registers hold; returns their sum, so that none is left out.
template <class R>
struct Kernels {
  std::int64_t flops;  // of a round
  R (*multiply_add)(std::int64_t rounds, R a, R b);
};

struct Table {
  Kernels<float> f32;
  Kernels<double> f64;
};

FASTMETA_TABLES

}  // namespace fastmeta::peak
