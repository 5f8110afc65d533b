// Entry of the inner update from Python: cuts the work into pieces, spreads them over threads, adds up their sums.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "../common/rates.h"
#include "../common/threads.h"
#include "kernels.h"
#include "math.h"

namespace py = pybind11;

namespace fastmeta::inner_update {
namespace {

constexpr std::int64_t piece_length = 4096;  // read a second time from the first-level cache

template <class R>
const Kernels<R>& kernels() {
  if constexpr (std::is_same_v<R, float>)
    return table_of(isa_in_use()).f32;
  else
    return table_of(isa_in_use()).f64;
}

template <class R>
void run_step(std::int64_t T, std::int64_t P, std::uintptr_t theta, std::int64_t theta_row, std::uintptr_t g,
          std::int64_t g_row, const Rate& rate, std::uintptr_t out, std::int64_t out_row, int threads) {
  const std::vector<Piece> pieces = cut_row("inner_update", rate, P, piece_length);
  const StepArgs<R> args{matrix<const R>(theta, theta_row),
                         matrix<const R>(g, g_row),
                         matrix<R>(out, out_row),
                         reinterpret_cast<const R*>(rate.alpha),
                         pieces.data(),
                         static_cast<std::int64_t>(pieces.size()),
                         rate.per_element()};
  const auto run = kernels<R>().step;
  const std::int64_t bytes = 3 * T * P * static_cast<std::int64_t>(sizeof(R));
  parallel_for(T * args.count, useful_threads(threads, bytes),
               [&](std::int64_t first, std::int64_t last, int) { run(args, first, last); });
}

template <class R>
void run_adjoint(std::int64_t T, std::int64_t P, std::uintptr_t lam, std::int64_t lam_row, std::uintptr_t g,
             std::int64_t g_row, const Rate& rate, std::uintptr_t u, std::int64_t u_row, std::uintptr_t d_alpha,
             int threads) {
  const bool by_columns = d_alpha != 0 && rate.per_element();
  const bool by_pieces = d_alpha != 0 && !by_columns;
  const std::vector<Piece> pieces = cut_row("inner_update", rate, P, by_columns ? columns_width<R> : piece_length);
  const auto count = static_cast<std::int64_t>(pieces.size());
  std::vector<double> sums(by_pieces ? T * count : 0);
  auto* d_alpha_out = reinterpret_cast<R*>(d_alpha);
  const AdjointArgs<R> args{matrix<const R>(lam, lam_row),
                            matrix<const R>(g, g_row),
                            matrix<R>(u, u_row),
                            reinterpret_cast<const R*>(rate.alpha),
                            pieces.data(),
                            count,
                            rate.per_element(),
                            by_pieces ? sums.data() : nullptr,
                            by_columns ? d_alpha_out : nullptr,
                            T};
  const std::int64_t bytes = 3 * T * P * static_cast<std::int64_t>(sizeof(R));
  const auto run = by_columns ? kernels<R>().columns : kernels<R>().adjoint;
  parallel_for(by_columns ? count : T * count, useful_threads(threads, bytes),
               [&](std::int64_t first, std::int64_t last, int) { run(args, first, last); });
  if (!by_pieces) return;

  // In the order of the pieces and tasks, whoever computed them: the sum does not depend on the number of threads.
  std::vector<Sums<double, 1>> total(rate.entries);
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t i = 0; i < count; ++i) total[pieces[i].entry].add(0, sums[t * count + i]);
  for (std::int64_t s = 0; s < rate.entries; ++s) d_alpha_out[s] = static_cast<R>(-total[s].value(0));
}

}  // namespace

void bind(py::module_& m) {
  m.def(
      "inner_update_step",
      [](bool is_double, std::int64_t T, std::int64_t P, std::uintptr_t theta, std::int64_t theta_row, std::uintptr_t g,
         std::int64_t g_row, std::uintptr_t alpha, std::int64_t entries, std::uintptr_t segments,
         std::int64_t segment_count, std::uintptr_t out, std::int64_t out_row, int threads) {
        const Rate rate{alpha, entries, segments, segment_count};
        const auto run = is_double ? run_step<double> : run_step<float>;
        run(T, P, theta, theta_row, g, g_row, rate, out, out_row, threads);
      },
      py::call_guard<py::gil_scoped_release>(), "Eq. (3) on addresses and row distances.");
  m.def(
      "inner_update_adjoint",
      [](bool is_double, std::int64_t T, std::int64_t P, std::uintptr_t lam, std::int64_t lam_row, std::uintptr_t g,
         std::int64_t g_row, std::uintptr_t alpha, std::int64_t entries, std::uintptr_t segments,
         std::int64_t segment_count, std::uintptr_t u, std::int64_t u_row, std::uintptr_t d_alpha, int threads) {
        const Rate rate{alpha, entries, segments, segment_count};
        const auto run = is_double ? run_adjoint<double> : run_adjoint<float>;
        run(T, P, lam, lam_row, g, g_row, rate, u, u_row, d_alpha, threads);
      },
      py::call_guard<py::gil_scoped_release>(), "Eq. (5), and eq. (7) where d_alpha is not 0.");
}

}  // namespace fastmeta::inner_update
