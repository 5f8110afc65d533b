// What an adaptive step may have, and the numbers it is made of (docs/maths.md, eq. 19).
#pragma once

namespace fastmeta::adaptive_update {

// The numbers of a step, in the order in which Python passes them.
enum Coefficient {
  decay,
  keep_first,
  take_first,
  keep_second,
  take_second,
  of_first,
  of_second,
  eps_root,
  eps,
  momentum,
  shrink,
  coefficients
};

// Which moments a step has, and where they stand; numbered as in Python.
constexpr int forms = 6;
template <int F>
struct Form {
  static constexpr bool buffer = F == 1 || F == 3;    // of steps: RMSprop's momentum
  static constexpr bool centred = F == 2 || F == 3;   // the first moment's square is taken from the second
  static constexpr bool averaged = F == 4 || F == 5;  // the first moment is what the root divides: Adam
  static constexpr bool largest = F == 5;             // the largest second moment so far is in the root: AMSGrad
  static constexpr bool first = centred || averaged;
};

}  // namespace fastmeta::adaptive_update
