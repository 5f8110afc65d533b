#include "measure.h"

#include <chrono>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/threads.h"
#include "kernels.h"

namespace fastmeta::peak {
namespace {

// A thread that comes late leaves its share to another one, and the trial takes that one's time twice.
template <class F>
double least_seconds(int trials, int threads, F work) {
  double least = 0;
  for (int trial = 0; trial < trials; ++trial) {
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(threads, threads, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t i = first; i < last; ++i) work(i);
    });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    if (trial == 0 || seconds < least) least = seconds;
  }
  return least;
}

template <class R>
const Kernels<R>& kernels_in_use() {
  const Table& table = table_of(isa_in_use());
  if constexpr (std::is_same_v<R, float>)
    return table.f32;
  else
    return table.f64;
}

}  // namespace

template <class R>
double multiply_add_seconds(std::int64_t rounds, int trials, int threads, std::int64_t& flops) {
  const Kernels<R>& kernels = kernels_in_use<R>();
  std::vector<R> sums(threads);
  flops = kernels.flops * rounds * threads;
  // x tends to b / (1 - a) = 2: neither to infinity nor to numbers so small that a processor slows down.
  return least_seconds(trials, threads,
                       [&](std::int64_t i) { sums[i] = kernels.multiply_add(rounds, R(0.5), R(1)); });
}

template double multiply_add_seconds<float>(std::int64_t, int, int, std::int64_t&);
template double multiply_add_seconds<double>(std::int64_t, int, int, std::int64_t&);

double copy_seconds(std::int64_t bytes, std::int64_t times, int trials, int threads) {
  // A line between them: two places a multiple of 4 KiB apart get in each other's way.
  constexpr std::int64_t gap = 64;
  std::vector<std::unique_ptr<char[]>> buffers;
  for (int i = 0; i < threads; ++i) {
    buffers.emplace_back(new char[2 * bytes + gap]);
    std::memset(buffers.back().get(), i, 2 * bytes + gap);
  }
  return least_seconds(trials, threads, [&](std::int64_t i) {
    char *from = buffers[i].get(), *to = from + bytes + gap;
    for (std::int64_t n = 0; n < times; ++n) {
      std::memcpy(to, from, bytes);
      std::swap(from, to);
    }
  });
}

}  // namespace fastmeta::peak
