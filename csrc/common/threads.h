// A pool of threads that sleep when there is nothing to do for a while.
//
// PyTorch's own threads spin for milliseconds after each of its parallel regions. A second OpenMP pool would spin as
// well, and the two would take the processor from each other; these threads watch for the next job much shorter.
#pragma once

#include <cstdint>

namespace fastmeta {

// Calls work(context, first, last, seat) for ranges that cover [0, n) once each, on at most `threads` threads, the
// caller's among them, and returns when all are done. `seat` is less than `threads` and no other thread's at the same
// time; the caller's is 0. The caller first does own(context), when the others have been called. Neither must throw.
// Where the pool is in use by another thread, or the caller is itself at work on a job, everything runs on the caller.
using Work = void (*)(void* context, std::int64_t first, std::int64_t last, int seat);
using Own = void (*)(void* context);
void parallel_ranges(std::int64_t n, int threads, Work work, Own own, void* context);

template <class F, class G>
void parallel_for(std::int64_t n, int threads, F f, G own) {
  struct Both {
    F& f;
    G& own;
  } both{f, own};
  parallel_ranges(
      n, threads,
      [](void* g, std::int64_t first, std::int64_t last, int seat) { static_cast<Both*>(g)->f(first, last, seat); },
      [](void* g) { static_cast<Both*>(g)->own(); }, &both);
}

template <class F>
void parallel_for(std::int64_t n, int threads, F f) {
  parallel_for(n, threads, f, [] {});
}

}  // namespace fastmeta
