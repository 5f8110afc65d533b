#include <algorithm>
#include <climits>
#include <limits>
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

template <class... Plans>
struct Kinds {};

// Networks that have kernels of their own: the usual regressors of sine waves.
template <Activation activation, int width>
using Regressor = Fixed<Shape<activation, Loss::squared_error, 1, width, width, 1>>;
using Common = Kinds<Regressor<Activation::relu, 40>, Regressor<Activation::tanh, 40>, Regressor<Activation::relu, 64>,
                     Regressor<Activation::tanh, 64>>;

template <class R, class F>
bool with_common(const Plan&, F&, Kinds<>) {
  return false;
}

// f(plan, kernel) with the first kind that a plan is of; whether there is one.
template <class R, class F, class P, class... Others>
bool with_common(const Plan& plan, F& f, Kinds<P, Others...>) {
  if (!P::fits(plan)) return with_common<R>(plan, f, Kinds<Others...>{});
  f(P(plan), meta_step<R, P, P::smooth>);
  return true;
}

// f(plan, kernel) with a plan's kernel. In float64, which is for checking, there is one for all activations.
template <class R, class F>
void with_kernel(const Plan& plan, F f) {
  if (plan.factored()) return f(Factored(plan), meta_step<R, Factored, true>);
  bool smooth = false;
  for (int i = 0; i < plan.layers; ++i) smooth = smooth || plan.layer[i].activation >= Activation::tanh;
  if constexpr (sizeof(R) == sizeof(float)) {
    if (with_common<R>(plan, f, Common{})) return;
    if (!smooth) return f(plan, meta_step<R, Plan, false>);
  }
  f(plan, meta_step<R, Plan, true>);
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
  std::size_t least = std::numeric_limits<std::size_t>::max();
  for (const bool factored : {false, true}) {  // factored last, for it takes products around its launches
    for (const bool spilled : {false, true}) {
      const Plan plan = plan_of(net, kind, spilled, factored);
      if (bytes<R>(plan) <= static_cast<std::size_t>(limit)) return plan;
      least = std::min(least, bytes<R>(plan));
    }
  }
  throw std::invalid_argument("a task takes " + std::to_string(least) + " bytes of shared memory, and a block has " +
                              std::to_string(limit));
}

template <class R>
void prepare(const Plan& plan, int device) {
  check(cudaSetDevice(device), "device");
  const int limit = shared_limit(device);
  with_kernel<R>(plan, [limit](const auto&, auto* kernel) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "shared memory");
  });
}

template <class R>
void launch(const Plan& plan, const Tensors<R>& io, int device, std::uintptr_t stream) {
  const std::int64_t sums = sum_blocks(plan, io.d_alpha != nullptr);
  if (io.tasks > INT_MAX || sums > INT_MAX) throw std::invalid_argument("resident: too many tasks for one launch");
  check(cudaSetDevice(device), "device");
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  with_kernel<R>(plan, [&](const auto& of_kind, auto* kernel) {
    FASTMETA_LAUNCH(kernel, static_cast<unsigned>(io.tasks), plan.threads, bytes<R>(plan), on, of_kind, io);
  });
  check(cudaGetLastError(), "launch");
  launch_early(sum_over_tasks<R>, static_cast<unsigned>(sums), sum_threads, on, device, plan, io);
  check(cudaGetLastError(), "launch");
}

#define FASTMETA_INSTANTIATE(R)                                      \
  template Plan fitting_plan<R>(const Network&, const Kind&, int);   \
  template void prepare<R>(const Plan&, int);                        \
  template void launch<R>(const Plan&, const Tensors<R>&, int, std::uintptr_t);
FASTMETA_INSTANTIATE(float)
FASTMETA_INSTANTIATE(double)

}  // namespace fastmeta::resident
