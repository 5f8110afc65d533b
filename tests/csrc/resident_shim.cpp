// The resident executor on a CPU, as a library that tests load: the same source that nvcc compiles, by cuda_shim.h.
#define FASTMETA_CUDA_SHIM
#include "resident/cuda.cu"

namespace fastmeta::resident {
namespace {

// layers: (in, out, activation, weight, bias) each.
Network network_of(const int* layers, const double* slopes, int count, const std::int64_t* loss, int support, int query) {
  Network net{{}, static_cast<Loss>(loss[0]), loss[1] != 0, loss[2], support, query};
  for (int i = 0; i < count; ++i, layers += 5)
    net.layers.push_back({layers[0], layers[1], static_cast<Activation>(layers[2]), slopes[i], layers[3], layers[4]});
  return net;
}

template <class R>
int run(const int* layers, const double* slopes, int count, const std::int64_t* loss, int support, int query,
        const int* kind, std::int64_t tasks, void* const* tensors, void* const* first, int limit, int threads,
        unsigned seed) {
  const Network net = network_of(layers, slopes, count, loss, support, query);
  const Kind asked{kind[0], kind[1] != 0, kind[2] != 0, kind[3] != 0, kind[4], kind[5], kind[6], kind[7]};
  Plan plan{};
  try {
    plan = fitting_plan<R>(net, asked, limit);
  } catch (const std::invalid_argument&) {
    return -1;
  }
  if (first == nullptr && plan.factored()) return -1;
  if (first != nullptr && !plan.factored()) plan = plan_of(net, asked, plan.spilled, true);
  if (threads > 0) plan.threads = threads;
  const auto at = [&](int i) { return static_cast<R*>(tensors[i]); };
  Tensors<R> io{};
  io.tasks = tasks;
  for (int i = 0; i < 2; ++i) io.x[i] = at(i), io.target[i] = tensors[2 + i];
  io.alpha = at(4), io.d_losses = at(5), io.loss = at(6), io.losses = at(7), io.support_losses = at(8);
  io.outputs = at(9), io.gradient = at(10), io.d_alpha = at(11);
  for (int i = 0; first != nullptr && i < 2; ++i)
    io.base[i] = static_cast<R*>(first[i]), io.coefficients[i] = static_cast<R*>(first[2 + i]);
  for (int i = 0; i < count; ++i)
    for (int part = 0; part < 2; ++part)
      if (plan.layer[i].parameter[part] != absent) io.parameter[i][part] = at(12 + plan.layer[i].parameter[part]);
  const std::vector<std::int64_t> sizes = {tasks * plan.packed, tasks * plan.steps * plan.layers * 2,
                                           tasks * plan.steps * plan.tape()};
  std::vector<std::vector<R>> scratch;
  for (const std::int64_t size : sizes) scratch.emplace_back(size + 4, static_cast<R>(NAN));
  io.task_gradients = scratch[0].data(), io.rate_products = scratch[1].data(), io.tape = scratch[2].data();
  shim::seed = seed;
  launch(plan, io, 0, 0);
  return plan.spilled ? 1 : 0;
}

}  // namespace
}  // namespace fastmeta::resident

// first: bases and coefficients of a factored first layer, or null where it is not. Returns whether passes were kept in
// global memory, or -1 where nothing fits into `limit` bytes.
#define FASTMETA_ENTRY(name, R)                                                                                      \
  extern "C" int name(const int* layers, const double* slopes, int count, const std::int64_t* loss, int support,    \
                      int query, const int* kind, std::int64_t tasks, void* const* tensors, void* const* first,     \
                      int limit, int threads, unsigned seed) {                                                       \
    return fastmeta::resident::run<R>(layers, slopes, count, loss, support, query, kind, tasks, tensors, first,     \
                                      limit, threads, seed);                                                         \
  }
FASTMETA_ENTRY(run32, float)
FASTMETA_ENTRY(run64, double)
