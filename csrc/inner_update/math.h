// The formulas of the inner update (docs/maths.md, eq. 3, 5 and 7), for one parameter of one task.
//
// Compiled without contraction to fused multiply-adds (-ffp-contract=off): the products round as they do in PyTorch and
// in every instruction set, so that all of them return the same bits. Memory, not arithmetic, bounds these loops.
#pragma once

#include "../common/host_device.h"

namespace fastmeta::inner_update {
namespace {  // one copy a file, see common/isa.h

template <class R>
FASTMETA_HD R step(R theta, R alpha, R g) {  // (3)
  return theta - alpha * g;
}

template <class R>
FASTMETA_HD R adjoint(R alpha, R lam) {  // (5)
  return alpha * lam;
}

// N sums side by side, each of many products of both signs, eq. (7). Products of two floats are exact in double, and so
// wide a sum needs no more care; products of doubles are summed with the rounding error of each addition carried along
// (Knuth's TwoSum).
template <class R, int N>
struct Sums;

template <int N>
struct Sums<float, N> {
  double total[N] = {};
  FASTMETA_HD void add(int i, float x, float y) { total[i] += static_cast<double>(x) * static_cast<double>(y); }
  FASTMETA_HD double value(int i) const { return total[i]; }
};

template <int N>
struct Sums<double, N> {
  double total[N] = {}, error[N] = {};
  FASTMETA_HD void add(int i, double term) {
    const double sum = total[i] + term;
    const double part = sum - total[i];
    error[i] += (total[i] - (sum - part)) + (term - part);
    total[i] = sum;
  }
  FASTMETA_HD void add(int i, double x, double y) { add(i, x * y); }
  FASTMETA_HD double value(int i) const {
    const double corrected = total[i] + error[i];
    return corrected == corrected ? corrected : total[i];  // beside an infinite total the error means nothing
  }
};

}  // namespace
}  // namespace fastmeta::inner_update
