// Entry of the adaptive update from Python: cuts the work into pieces, spreads them over threads, adds up their sums.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/rates.h"
#include "../common/threads.h"
#include "kernels.h"

namespace py = pybind11;

namespace fastmeta::adaptive_update {
namespace {

// Where a matrix begins, and the distance between its rows; address 0 for one that is not there.
using Place = std::pair<std::uintptr_t, std::int64_t>;
using Numbers = std::array<double, coefficients>;

template <class R>
const Kernels<R>& kernels() {
  if constexpr (std::is_same_v<R, float>)
    return table_of(isa_in_use()).f32;
  else
    return table_of(isa_in_use()).f64;
}

template <class R>
Matrix<R> matrix(const Place& place) {
  return fastmeta::matrix<R>(place.first, place.second);
}

template <class R>
States<R> states(const std::array<Place, 4>& places) {
  return {matrix<R>(places[0]), matrix<R>(places[1]), matrix<R>(places[2]), matrix<R>(places[3])};
}

template <class R>
void fill(R (&c)[coefficients], const Numbers& numbers) {
  for (int i = 0; i < coefficients; ++i) c[i] = static_cast<R>(numbers[i]);
}

void check(int form) {
  if (form < 0 || form >= forms)
    throw std::invalid_argument("adaptive_update: form must be below " + std::to_string(forms) + ", got " +
                                std::to_string(form));
}

struct Call {
  int form;
  std::int64_t T, P;
  Place phi, g;
  std::array<Place, 4> before;
  Numbers numbers;
  Rate rate;
  int threads;
};

template <class R>
void run_step(const Call& call, const Place& phi_after, const std::array<Place, 4>& after) {
  const std::vector<Piece> pieces = cut_row("adaptive_update", call.rate, call.P, piece_length<R>);
  StepArgs<R> args{matrix<const R>(call.phi), matrix<const R>(call.g), states<const R>(call.before),
                   matrix<R>(phi_after), states<R>(after), reinterpret_cast<const R*>(call.rate.alpha),
                   call.rate.per_element(), pieces.data(), static_cast<std::int64_t>(pieces.size()), {}};
  fill(args.c, call.numbers);
  const auto run = kernels<R>().step[call.form];
  const std::int64_t bytes = 6 * call.T * call.P * static_cast<std::int64_t>(sizeof(R));
  parallel_for(call.T * args.count, useful_threads(call.threads, bytes),
               [&](std::int64_t first, std::int64_t last, int) { run(args, first, last); });
}

struct Cotangents {
  Place lam;
  std::array<Place, 4> after;
  Place lam_before, u;
  std::array<Place, 4> before;
  std::uintptr_t d_alpha, d_numbers;
};

template <class R>
void run_adjoint(const Call& call, const Cotangents& d) {
  const std::vector<Piece> pieces = cut_row("adaptive_update", call.rate, call.P, piece_length<R>);
  const auto count = static_cast<std::int64_t>(pieces.size());
  const bool summing = d.d_numbers != 0, by_columns = summing && call.rate.per_element();
  const std::int64_t items = by_columns ? count : call.T * count;
  std::vector<double> sums(summing ? items * terms : 0);
  auto* d_alpha = reinterpret_cast<R*>(d.d_alpha);
  AdjointArgs<R> args{matrix<const R>(call.phi), matrix<const R>(call.g), states<const R>(call.before),
                      matrix<const R>(d.lam), states<const R>(d.after), matrix<R>(d.lam_before), matrix<R>(d.u),
                      states<R>(d.before), reinterpret_cast<const R*>(call.rate.alpha), call.rate.per_element(),
                      pieces.data(), count, {}, summing ? sums.data() : nullptr, d_alpha, call.T};
  fill(args.c, call.numbers);
  const auto run = kernels<R>().adjoint[call.form];
  const std::int64_t bytes = 9 * call.T * call.P * static_cast<std::int64_t>(sizeof(R));
  parallel_for(items, useful_threads(call.threads, bytes),
               [&](std::int64_t first, std::int64_t last, int) { run(args, first, last); });
  if (!summing) return;

  // In the order of the pieces and tasks, whoever computed them: the sum does not depend on the number of threads.
  double total[coefficients] = {};
  std::vector<double> of_rates(by_columns ? 0 : call.rate.entries);
  for (std::int64_t item = 0; item < items; ++item) {
    const double* found = sums.data() + item * terms;
    for (int k = 0; k < coefficients; ++k) total[k] += found[k];
    if (!by_columns) of_rates[pieces[item % count].entry] += found[of_alpha];
  }
  auto* d_numbers = reinterpret_cast<double*>(d.d_numbers);
  for (int k = 0; k < coefficients; ++k) d_numbers[k] = total[k];
  for (std::size_t s = 0; s < of_rates.size(); ++s) d_alpha[s] = static_cast<R>(of_rates[s]);
}

}  // namespace

void bind(py::module_& m) {
  m.def(
      "adaptive_update_step",
      [](bool is_double, int form, std::int64_t T, std::int64_t P, Place phi, Place g, std::array<Place, 4> before,
         Numbers numbers, std::uintptr_t alpha, std::int64_t entries, std::uintptr_t segments,
         std::int64_t segment_count, Place phi_after, std::array<Place, 4> after, int threads) {
        check(form);
        const Call call{form, T, P, phi, g, before, numbers, {alpha, entries, segments, segment_count}, threads};
        (is_double ? run_step<double> : run_step<float>)(call, phi_after, after);
      },
      py::call_guard<py::gil_scoped_release>(), "Eq. (19) on addresses and row distances.");
  m.def(
      "adaptive_update_adjoint",
      [](bool is_double, int form, std::int64_t T, std::int64_t P, Place phi, Place g, std::array<Place, 4> before,
         Numbers numbers, std::uintptr_t alpha, std::int64_t entries, std::uintptr_t segments,
         std::int64_t segment_count, Place lam, std::array<Place, 4> d_after, Place lam_before, Place u,
         std::array<Place, 4> d_before, std::uintptr_t d_alpha, std::uintptr_t d_numbers, int threads) {
        check(form);
        const Call call{form, T, P, phi, g, before, numbers, {alpha, entries, segments, segment_count}, threads};
        (is_double ? run_adjoint<double> : run_adjoint<float>)(
            call, {lam, d_after, lam_before, u, d_before, d_alpha, d_numbers});
      },
      py::call_guard<py::gil_scoped_release>(), "Eq. (20), and the gradients (21) where d_numbers is not 0.");
}

}  // namespace fastmeta::adaptive_update
