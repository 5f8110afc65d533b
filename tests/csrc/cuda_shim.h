// Runs CUDA C++ kernels on a CPU, for tests: one block at a time, its threads as fibers.
//
// Barriers, warp barriers and shuffles are where fibers change; a seed permutes the order in which they run between
// those, so that what lacks a barrier gives another result. Dynamic shared memory begins as NaN. It aborts where threads
// of a block wait at different barriers or part of a warp comes to an operation of warps.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks do not run side by side

namespace shim {

struct Index {
  unsigned x, y, z;
};

enum class State { running, at_barrier, at_warp, done };

constexpr std::size_t stack_bytes = 128 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  State state;
  int line;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current, seed;
inline Index block_index, block_size, grid_size;
inline std::vector<unsigned char> shared_memory;
inline std::function<void()> kernel;
inline std::uint64_t exchanged[1024];

[[noreturn]] inline void fail(const char* what, int line) {
  std::fprintf(stderr, "cuda shim: %s, line %d, block %u\n", what, line, block_index.x);
  std::abort();
}

inline void enter() {
  kernel();
  fibers[current].state = State::done;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void wait(State state, int line) {
  fibers[current].state = state;
  fibers[current].line = line;
  swapcontext(&fibers[current].context, &scheduler);
}

// Lets the threads [begin, end) go on if they all wait in the same place; whether they do.
inline bool release(unsigned begin, unsigned end, State state, const char* fault) {
  unsigned waiting = 0;
  for (unsigned i = begin; i < end; ++i) waiting += fibers[i].state == state;
  if (waiting == 0) return false;
  for (unsigned i = begin; i < end; ++i)
    if (fibers[i].state != state || fibers[i].line != fibers[begin].line) fail(fault, fibers[i].line);
  for (unsigned i = begin; i < end; ++i) fibers[i].state = State::running;
  return true;
}

inline void run_block() {
  const unsigned count = block_size.x;
  if (count % 32 != 0 || count > 1024) fail("blocks must be of whole warps", 0);
  std::fill(shared_memory.begin(), shared_memory.end(), 0xFF);
  if (fibers.size() < count) fibers = std::vector<Fiber>(count);
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) {
    order[i] = i;
    Fiber& fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    fiber.state = State::running;
    makecontext(&fiber.context, enter, 0);
  }
  unsigned random = seed * 2654435761u + block_index.x;
  for (bool more = true; more;) {
    for (unsigned i = count; seed != 0 && i > 1; --i) {
      random = random * 1664525u + 1013904223u;
      std::swap(order[i - 1], order[(random >> 8) % i]);
    }
    for (const unsigned i : order) {
      if (fibers[i].state != State::running) continue;
      current = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
    more = false;
    for (unsigned first = 0; first < count; first += 32)
      more |= release(first, first + 32, State::at_warp, "part of a warp at an operation of warps");
    if (!more) more = release(0, count, State::at_barrier, "threads of a block at different barriers");
  }
}

template <class Kernel, class... Arguments>
void launch(Kernel given, unsigned blocks, unsigned threads, std::size_t bytes, const Arguments&... arguments) {
  shared_memory.assign(bytes + 64, 0xFF);
  grid_size = {blocks, 1, 1}, block_size = {threads, 1, 1};
  kernel = [&, given] { given(arguments...); };
  for (unsigned i = 0; i < blocks; ++i) {
    block_index = {i, 0, 0};
    run_block();
  }
}

template <class T>
T shuffle_xor(T value, unsigned away, int line) {
  static_assert(sizeof(T) <= sizeof exchanged[0], "one register");
  const unsigned self = current;
  std::memcpy(&exchanged[self], &value, sizeof value);
  wait(State::at_warp, line);
  std::memcpy(&value, &exchanged[self ^ away], sizeof value);
  wait(State::at_warp, line);
  return value;
}

// Behind the last byte asked for, 64 bytes at the most, lies NaN for good.
inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(shared_memory.data()) + 15) / 16 * 16);
}

}  // namespace shim

#define threadIdx (shim::Index{shim::current, 0, 0})
#define blockIdx (shim::block_index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)
#define __syncthreads() shim::wait(shim::State::at_barrier, __LINE__)
#define __syncwarp() shim::wait(shim::State::at_warp, __LINE__)
#define __shfl_xor_sync(mask, value, away) shim::shuffle_xor(value, away, __LINE__)
#define FASTMETA_SHARED(name) unsigned char* const name = shim::dynamic_shared()
#define FASTMETA_LAUNCH(kernel, blocks, threads, bytes, stream, ...) \
  ((void)(stream), shim::launch(kernel, blocks, threads, bytes, __VA_ARGS__))

using std::max;
using std::min;

// What of the runtime a launch needs; the device has as much shared memory as the environment says.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 227 << 10, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
