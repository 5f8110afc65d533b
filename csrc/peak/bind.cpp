#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "measure.h"

namespace py = pybind11;

namespace fastmeta::peak {

void bind(py::module_& m) {
  m.def(
      "multiply_add_seconds",
      [](bool is_double, std::int64_t rounds, int trials, int threads) {
        std::int64_t flops = 0;
        const auto run = is_double ? multiply_add_seconds<double> : multiply_add_seconds<float>;
        const double seconds = run(rounds, trials, threads, flops);
        return std::pair<double, std::int64_t>{seconds, flops};
      },
      py::call_guard<py::gil_scoped_release>(), "Seconds and operations; see csrc/peak/measure.h.");
  m.def("copy_seconds", copy_seconds, py::call_guard<py::gil_scoped_release>(), "See csrc/peak/measure.h.");
}

}  // namespace fastmeta::peak
