// Inner learning rates as they come from Python, and rows cut into pieces by them. For files that bind alone: kernels
// compiled per instruction set include no <vector> (common/isa.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "pieces.h"

namespace fastmeta {

// alpha: one entry for all parameters, one a segment, or one a parameter.
struct Rate {
  std::uintptr_t alpha;
  std::int64_t entries;
  std::uintptr_t segments;  // int64 [segment_count + 1], or 0
  std::int64_t segment_count;

  const std::int64_t* offsets() const { return reinterpret_cast<const std::int64_t*>(segments); }
  bool per_segment() const { return segments != 0 && entries == segment_count; }
  bool per_element() const { return !per_segment() && entries != 1; }
};

inline void cut(std::vector<Piece>& pieces, std::int64_t begin, std::int64_t end, std::int64_t length,
                std::int64_t entry) {
  for (; begin < end; begin += length) pieces.push_back({begin, std::min(begin + length, end), entry});
}

// A row of P parameters in pieces of at most `length`; `op` names the caller in messages.
inline std::vector<Piece> cut_row(const std::string& op, const Rate& rate, std::int64_t P, std::int64_t length) {
  std::vector<Piece> pieces;
  if (!rate.per_segment()) {
    if (rate.entries != 1 && rate.entries != P)
      throw std::invalid_argument(op + ": alpha must have 1, " +
                                  (rate.segments != 0 ? std::to_string(rate.segment_count) + " or " : "or ") +
                                  std::to_string(P) + " entries, got " + std::to_string(rate.entries));
    cut(pieces, 0, P, length, 0);
    return pieces;
  }
  const std::int64_t* at = rate.offsets();
  bool rising = at[0] == 0 && at[rate.segment_count] == P;
  for (std::int64_t s = 0; s < rate.segment_count; ++s) rising = rising && at[s] <= at[s + 1];
  if (!rising)
    throw std::invalid_argument(op + ": segments must rise from 0 to P = " + std::to_string(P) + ", got other offsets");
  for (std::int64_t s = 0; s < rate.segment_count; ++s) cut(pieces, at[s], at[s + 1], length, s);
  return pieces;
}

// One thread passes this many bytes in some 50 us from its caches; to wake a second one costs about as much.
constexpr std::int64_t bytes_per_thread = std::int64_t{4} << 20;

inline int useful_threads(int threads, std::int64_t bytes) {
  return static_cast<int>(std::clamp<std::int64_t>(bytes / bytes_per_thread, 1, std::max(threads, 1)));
}

template <class R>
Matrix<R> matrix(std::uintptr_t data, std::int64_t row) {
  return {reinterpret_cast<R*>(data), row};
}

}  // namespace fastmeta
