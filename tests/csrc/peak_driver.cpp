// Runs what measures the processor's peak, for the sanitizers: both precisions, several threads, small and odd copies.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "../../csrc/peak/kernels.h"
#include "../../csrc/peak/measure.h"

using namespace fastmeta;

namespace {

// After many rounds every x is b / (1 - a), whatever it was at first; a sum of equal numbers of a few bits is exact.
template <class R>
int check_sum(const peak::Kernels<R>& kernels) {
  const double elements = static_cast<double>(kernels.flops) / 2;
  const double found = kernels.multiply_add(200, R(0.5), R(1));
  const bool right = found == 2 * elements;
  if (!right) std::printf("multiply_add: a sum of %g over %g elements of 2\n", found, elements);
  return right ? 0 : 1;
}

template <class R>
int check_time(int threads) {
  std::int64_t flops = 0, once = 0;
  const double seconds = peak::multiply_add_seconds<R>(1000, 3, threads, flops);
  peak::multiply_add_seconds<R>(1, 1, 1, once);
  if (seconds > 0 && flops == 1000 * threads * once) return 0;
  std::printf("multiply_add_seconds: %g s for %lld operations\n", seconds, static_cast<long long>(flops));
  return 1;
}

}  // namespace

int main() {
  int failures = check_sum(peak::table_of(isa_in_use()).f32) + check_sum(peak::table_of(isa_in_use()).f64);
  for (const int threads : {1, 2, 5}) {
    failures += check_time<float>(threads) + check_time<double>(threads);
    for (const std::int64_t bytes : {1, 63, 4096, 100001})
      if (!(peak::copy_seconds(bytes, 3, 2, threads) > 0)) ++failures;
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
