// Weights as the caller has them, and packed. Each slice of a grouped convolution is packed as the block diagonal of a
// dense one: what lies off it is padding, zero in the weight and in its gradient.
#pragma once

#include "geometry.h"

namespace fastmeta::conv_block {
namespace {

template <class R>
void weight_sizes(const Shape& s, const Geometry<R>& g, std::int64_t* sizes) {
  sizes[0] = g.weight();
  sizes[1] = s.bias ? g.co : 0;
  sizes[2] = sizes[3] = s.affine ? g.co : 0;
  sizes[4] = sizes[5] = s.norm == Norm::running ? g.co : 0;
}

// Where the packed weight from an input channel to the channels of its slice's result lies.
template <class R>
std::int64_t weight_row(const Geometry<R>& g, std::int64_t channel, std::int64_t tap) {
  return ((channel / g.depth * g.taps + tap) * g.depth + channel % g.depth) * g.slice_out;
}

// visit(place in the tensor, place in the packed weight)
template <class R, class Visit>
void for_each_weight(const Geometry<R>& g, int which, Visit visit) {
  if (which > 0) {
    for (std::int64_t o = 0; o < g.out; ++o) visit(o, o);
    return;
  }
  const std::int64_t in = g.in / g.groups, out = g.out / g.groups;
  std::int64_t at = 0;
  for (std::int64_t o = 0; o < g.out; ++o)
    for (std::int64_t i = o / out * in; i < (o / out + 1) * in; ++i)
      for (std::int64_t t = 0; t < g.taps; ++t) visit(at++, weight_row(g, i, t) + o % g.slice_out);
}

template <class R>
void pack_weight(const Geometry<R>& g, int which, const R* tensor, R* packed) {
  fill_zero(packed, which == 0 ? g.weight() : g.co);
  for_each_weight(g, which, [=](std::int64_t from, std::int64_t to) { packed[to] = tensor[from]; });
}

template <class R>
void unpack_weight(const Geometry<R>& g, int which, const R* packed, R* tensor) {
  for_each_weight(g, which, [=](std::int64_t to, std::int64_t from) { tensor[to] = packed[from]; });
}

// Gradients are made for whole slices.
template <class R>
void clear_between_groups(const Geometry<R>& g, R* dw) {
  if (g.groups == 1 || dw == nullptr) return;
  const std::int64_t in = g.in / g.groups, out = g.out / g.groups;
  for (std::int64_t i = 0; i < g.slices * g.slice_in; ++i)
    for (std::int64_t t = 0; t < g.taps; ++t) {
      R* row = dw + weight_row(g, i, t);
      const std::int64_t first = i / g.slice_in * g.slice_out;
      for (std::int64_t o = 0; o < g.slice_out; ++o)
        if (i >= g.in || (first + o) / out != i / in) row[o] = 0;
    }
}

}  // namespace
}  // namespace fastmeta::conv_block
