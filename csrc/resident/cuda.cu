#include <climits>
#include <stdexcept>
#include <string>

#include "kernel.cuh"
#include "launch.h"
#include "sums.cuh"

namespace fastmeta::resident {
namespace {

static_assert(sizeof(Plan) + sizeof(Tensors<double>) <= 4096, "a launch's arguments");

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw std::runtime_error(std::string("resident: ") + what + ": " + cudaGetErrorString(status));
}

template <class R>
std::size_t bytes(const Plan& plan) {
  return sizeof(R) * static_cast<std::size_t>(plan.elements);
}

// The kernel for a plan's curves; one for all is enough for float64, which is for checking.
template <class R>
auto meta_step_of(const Plan& plan) {
  bool smooth = sizeof(R) > sizeof(float);
  for (int i = 0; i < plan.layers; ++i) smooth = smooth || plan.layer[i].activation >= Activation::tanh;
  if constexpr (sizeof(R) == sizeof(float)) return smooth ? meta_step<R, true> : meta_step<R, false>;
  else return meta_step<R, true>;
}

template <class R>
void allow_shared(void (*kernel)(Plan, Tensors<R>), int limit) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "shared memory");
}

}  // namespace

int devices(std::string& reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return count;
  cudaGetLastError();
  reason = status == cudaSuccess ? "there is no CUDA device" : cudaGetErrorString(status);
  return 0;
}

int shared_limit(int device) {
  int limit = 0;
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
  return limit;
}

template <class R>
Plan fitting_plan(const Network& net, const Kind& kind, int limit) {
  const Plan whole = plan_of(net, kind, false);
  if (bytes<R>(whole) <= static_cast<std::size_t>(limit)) return whole;
  const Plan spilled = plan_of(net, kind, true);
  const std::size_t least = std::min(bytes<R>(whole), bytes<R>(spilled));
  if (least > static_cast<std::size_t>(limit))
    throw std::invalid_argument("a task takes " + std::to_string(least) + " bytes of shared memory, and a block has " +
                                std::to_string(limit));
  return spilled;
}

template <class R>
void prepare(int device) {
  check(cudaSetDevice(device), "device");
  allow_shared<R>(meta_step<R, true>, shared_limit(device));
  if constexpr (sizeof(R) == sizeof(float)) allow_shared<R>(meta_step<R, false>, shared_limit(device));
}

template <class R>
void launch(const Plan& plan, const Tensors<R>& io, int device, std::uintptr_t stream) {
  const std::int64_t sums = sum_blocks(plan, io.d_alpha != nullptr);
  if (io.tasks > INT_MAX || sums > INT_MAX) throw std::invalid_argument("resident: too many tasks for one launch");
  check(cudaSetDevice(device), "device");
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  FASTMETA_LAUNCH(meta_step_of<R>(plan), static_cast<unsigned>(io.tasks), plan.threads, bytes<R>(plan), on, plan, io);
  check(cudaGetLastError(), "launch");
  launch_early(sum_over_tasks<R>, static_cast<unsigned>(sums), sum_threads, on, device, plan, io);
  check(cudaGetLastError(), "launch");
}

#define FASTMETA_INSTANTIATE(R)                                      \
  template Plan fitting_plan<R>(const Network&, const Kind&, int);   \
  template void prepare<R>(int);                                     \
  template void launch<R>(const Plan&, const Tensors<R>&, int, std::uintptr_t);
FASTMETA_INSTANTIATE(float)
FASTMETA_INSTANTIATE(double)

}  // namespace fastmeta::resident
