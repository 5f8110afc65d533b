// Seconds that a number of threads take at the least, each for the same work of its own, all at once.
#pragma once

#include <cstdint>

namespace fastmeta::peak {

// `rounds` rounds of multiply-adds (kernels.h) on each thread, the quickest of some trials; `flops` is set to the
// operations of all threads.
template <class R>
double multiply_add_seconds(std::int64_t rounds, int trials, int threads, std::int64_t& flops);

// `times` copies on each thread of `bytes` bytes to another place, which are then copied back, and so on; the quickest
// of some trials.
double copy_seconds(std::int64_t bytes, std::int64_t times, int trials, int threads);

}  // namespace fastmeta::peak
