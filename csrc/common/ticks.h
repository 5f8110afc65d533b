// The cheapest clock of a processor, in units of its own: some 20 cycles a reading on x86-64, whose time-stamp counter
// runs at one rate on all cores of the processors of the last fifteen years; elsewhere the standard library's.
#pragma once

#include <chrono>
#include <cstdint>

namespace fastmeta {

inline std::int64_t ticks() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  return static_cast<std::int64_t>(__builtin_ia32_rdtsc());
#else
  return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

}  // namespace fastmeta
