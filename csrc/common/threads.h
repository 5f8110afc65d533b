// A pool of threads that sleep when there is nothing to do for a while.
//
// PyTorch's own threads spin for milliseconds after each of its parallel regions. A second OpenMP pool would spin as
// well, and the two would take the processor from each other; these threads watch for the next job much shorter.
#pragma once

#include <cstdint>

namespace fastmeta {

// Calls work(context, first, last, seat) for ranges that cover [0, n) once each, on at most `threads` threads, the
// caller's among them, and returns when all are done. `seat` is less than `threads` and no other thread's at the same
// time; the caller's is 0. `work` must not throw. Where the pool is in use by another thread, or the caller is itself
// one of the pool's, everything runs on the caller.
using Work = void (*)(void* context, std::int64_t first, std::int64_t last, int seat);
void parallel_ranges(std::int64_t n, int threads, Work work, void* context);

template <class F>
void parallel_for(std::int64_t n, int threads, F f) {
  parallel_ranges(
      n, threads,
      [](void* g, std::int64_t first, std::int64_t last, int seat) { (*static_cast<F*>(g))(first, last, seat); }, &f);
}

}  // namespace fastmeta
