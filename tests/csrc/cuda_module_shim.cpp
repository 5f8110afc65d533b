// The extension module fastmeta._cuda on a CPU: its own sources, by cuda_shim.h, for tensors of the CPU.
#define FASTMETA_CUDA_SHIM
#include "resident/cuda.cu"
#include "resident/bind.cpp"
#include "cuda_module.cpp"
