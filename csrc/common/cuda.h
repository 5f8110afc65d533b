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

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FASTMETA_OVERLAPS 1  // a launch may begin while the one before it ends
#else
#define FASTMETA_OVERLAPS 0
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

// Lets the blocks of the next launch, if it is one that `launch_early` made, come to `await_launch_before`.
FASTMETA_DEVICE void admit_next_launch() {
#if FASTMETA_OVERLAPS
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until the launch before has ended, and all that it wrote can be read.
FASTMETA_DEVICE void await_launch_before() {
#if FASTMETA_OVERLAPS
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if !defined(FASTMETA_CUDA_SHIM)
// Launches a kernel that calls `await_launch_before`: on a GPU that can do so its blocks are there when that is over.
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream, int device,
                  const Arguments&... arguments) {
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.stream = stream;
  config.attrs = &early, config.numAttrs = major >= 9 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);  // the caller asks for the last error
}
#else
template <class Kernel, class... Arguments>
void launch_early(Kernel kernel, unsigned blocks, unsigned threads, cudaStream_t, int, const Arguments&... arguments) {
  shim::launch(kernel, blocks, threads, 0, arguments...);
}
#endif

}  // namespace fastmeta
