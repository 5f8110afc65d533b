// Marks a formula that a CPU kernel and a CUDA kernel share.
#pragma once

#if defined(__CUDACC__)
#define FASTMETA_HD __host__ __device__ __forceinline__
#else
#define FASTMETA_HD inline
#endif
