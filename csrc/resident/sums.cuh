// Sums over tasks of what the blocks have left, each in one fixed order: the mean loss, the meta-gradient, the rates'.
#pragma once

#include "plan.h"
#include "products.cuh"
#include "tensors.h"

namespace fastmeta::resident {

constexpr int sum_groups = 8;  // of tasks, each added up by another warp
constexpr int sum_threads = sum_groups * warp_size;

inline std::int64_t gradient_blocks(const Plan& plan) {
  return plan.gradient ? (plan.gradient_elements + warp_size - 1) / warp_size : 0;
}

// Blocks for the gradient's elements, one for the mean loss, and one for each rate.
inline std::int64_t sum_blocks(const Plan& plan, bool rates) {
  return gradient_blocks(plan) + 1 + (rates ? plan.rate_rows * plan.rate_columns : 0);
}

// Place in a packed vector of one element of the flat gradient.
FASTMETA_DEVICE int packed_place(const Plan& plan, std::int64_t element) {
  for (int i = 0; i < plan.layers; ++i) {
    const Layer& l = plan.layer[i];
    const std::int64_t weight = element - l.gradient[0], bias = element - l.gradient[1];
    if (l.gradient[0] != absent && weight >= 0 && weight < std::int64_t{l.in} * l.out) {
      const int at = static_cast<int>(weight), row = at / l.in;
      return l.w + row * l.stride + (at - row * l.in);
    }
    if (l.gradient[1] != absent && bias >= 0 && bias < l.out) return l.w + static_cast<int>(bias) * l.stride + l.in;
  }
  return 0;
}

template <class R>
FASTMETA_DEVICE void sum_gradient(const Plan& plan, const Tensors<R>& io, int lane, int group) {
  __shared__ R parts[sum_groups][warp_size];
  const std::int64_t element = std::int64_t{blockIdx.x} * warp_size + lane;
  R sum = 0;
  if (element < plan.gradient_elements) {
    const R* first = io.task_gradients + packed_place(plan, element);
#pragma unroll 4
    for (std::int64_t t = group; t < io.tasks; t += sum_groups) sum += first[t * plan.packed];
  }
  parts[group][lane] = sum;
  __syncthreads();
  if (group > 0 || element >= plan.gradient_elements) return;
  for (int i = 1; i < sum_groups; ++i) sum += parts[i][lane];
  io.gradient[element] = sum;
}

// The derivative by one rate, eq. (7): minus the products of the steps and parameters that it is the rate of.
template <class R>
FASTMETA_DEVICE void sum_rate(const Plan& plan, const Tensors<R>& io, int lane, int rate) {
  const int row = rate / plan.rate_columns, column = rate - row * plan.rate_columns;
  R sum = 0;
  for (std::int64_t t = lane; t < io.tasks; t += warp_size)
    for (int k = plan.rate_rows > 1 ? row : 0; k < (plan.rate_rows > 1 ? min(row + 1, plan.steps) : plan.steps); ++k)
      for (int i = 0; i < 2 * plan.layers; ++i) {
        const int parameter = plan.layer[i / 2].parameter[i & 1];
        if (parameter == absent || parameter >= plan.adapted) continue;
        if (plan.rate_columns > 1 && parameter != column) continue;
        sum += io.rate_products[(t * plan.steps + k) * 2 * plan.layers + i];
      }
  sum = warp_sum(sum);
  if (lane == 0) io.d_alpha[rate] = -sum;
}

template <class R>
__global__ void __launch_bounds__(sum_threads)
    sum_over_tasks(const __grid_constant__ Plan plan, const __grid_constant__ Tensors<R> io) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size, group = static_cast<int>(threadIdx.x) / warp_size;
  const int gradients = plan.gradient ? static_cast<int>((plan.gradient_elements + warp_size - 1) / warp_size) : 0;
  const int block = static_cast<int>(blockIdx.x);
  await_launch_before();
  if (block < gradients) {
    sum_gradient(plan, io, lane, group);
  } else if (group == 0 && block == gradients) {
    R sum = 0;
    for (std::int64_t t = lane; t < io.tasks; t += warp_size) sum += io.losses[t];
    sum = warp_sum(sum);
    if (lane == 0) *io.loss = sum / static_cast<R>(io.tasks);
  } else if (group == 0) {
    sum_rate(plan, io, lane, block - gradients - 1);
  }
}

}  // namespace fastmeta::resident
