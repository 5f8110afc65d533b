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
