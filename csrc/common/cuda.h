// What a CUDA source needs of CUDA: its runtime; in tests a stand-in that runs kernels on a CPU (tests/csrc/cuda_shim.h).
#pragma once

#if defined(FASTMETA_CUDA_SHIM)
#include "cuda_shim.h"
#else
#include <cuda_runtime.h>
#define FASTMETA_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define FASTMETA_LAUNCH(kernel, blocks, threads, bytes, stream, ...) \
  kernel<<<blocks, threads, bytes, stream>>>(__VA_ARGS__)
#endif

#define FASTMETA_DEVICE __device__ __forceinline__

namespace fastmeta {

// Copies one number from global to shared memory, by no register: threads go on, and wait for all copies at once.
template <class R>
FASTMETA_DEVICE void copy_ahead(R* to, const R* from) {
#if defined(FASTMETA_CUDA_SHIM)
  *to = *from;
#else
  const auto place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(place), "l"(from), "n"(sizeof(R)) : "memory");
#endif
}

// Waits for this thread's copies; other threads see them after the next barrier.
FASTMETA_DEVICE void await_copies() {
#if !defined(FASTMETA_CUDA_SHIM)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace fastmeta
