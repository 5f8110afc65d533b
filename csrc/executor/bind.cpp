// Entry of the native executor from Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "call.h"
#include "bind_program.h"
#include "meta_gradient.h"

namespace py = pybind11;

namespace fastmeta::executor {
namespace {

template <class R>
void bind_type(py::module_& m, const char* name, const char* call_name) {
  using Self = MetaGradient<R>;
  using Bytes = std::vector<std::int64_t>;
  py::class_<Self>(m, name, "A lowered meta-step; see csrc/executor/meta_gradient.h.")
      .def(py::init([](const py::dict& support, const py::dict& query) {
        return std::make_unique<Self>(program_of(support), program_of(query), isa_in_use());
      }))
      .def_property_readonly("isa", [](const Self& self) { return isa_name(self.isa()); })
      .def("sharing",
           [](const Self& self, std::int64_t tasks, std::int64_t steps, bool second_order, bool learned,
              bool rate_per_parameter, int threads) {
             const Sharing share = self.sharing(tasks, {steps, second_order, learned, rate_per_parameter}, threads);
             return std::pair<int, int>{share.at_once, share.within};
           })
      .def("workspace_bytes",
           [](const Self& self, std::int64_t steps, bool second_order, bool learned, bool rate_per_parameter,
              int within) {
             return self.workspace_bytes({steps, second_order, learned, rate_per_parameter}, within);
           })
      .def("common_bytes",
           [](const Self& self, std::int64_t tasks, std::int64_t steps, bool second_order, bool learned,
              bool rate_per_parameter) {
             return self.common_bytes(tasks, {steps, second_order, learned, rate_per_parameter});
           })
      .def("profile", &Self::profile)
      .def("kept_bytes", [](const Self& self, bool second_order, bool learned) {
        const auto size = static_cast<std::int64_t>(sizeof(R));
        std::map<std::string, std::int64_t> kept;
        if (second_order) kept["values and cotangents"] = size * self.support().tape();
        if (second_order) kept["fast weights"] = size * self.support().packing().adapted;
        if (learned) kept["gradients"] = size * self.support().packing().adapted;
        return kept;
      })
      .def("kept_once_bytes",
           [](const Self& self) { return static_cast<std::int64_t>(sizeof(R)) * self.support().once(); })
      .def(
          "call",
          [](Self& self, std::int64_t steps, bool first_order, bool rate_per_step, bool rate_per_parameter,
             Bytes support_bytes, Bytes query_bytes, std::optional<std::size_t> wanted, std::int64_t output_rows,
             std::int64_t output_columns) {
            return std::make_unique<Call<R>>(self, steps, first_order, rate_per_step, rate_per_parameter,
                                             std::move(support_bytes), std::move(query_bytes), wanted, output_rows,
                                             output_columns);
          },
          py::keep_alive<0, 1>());
  py::class_<Call<R>>(m, call_name, "Meta-steps of one kind; see csrc/executor/call.h.").def("run", &Call<R>::run);
}

// Calls and seconds of threads, [operations][maps].
std::vector<std::vector<std::pair<std::int64_t, double>>> table_of(const Profile& profile,
                                                                   const std::vector<Tally>& tallies) {
  std::vector<std::vector<std::pair<std::int64_t, double>>> rows(tallies.size() / map_count);
  for (std::size_t i = 0; i < tallies.size(); ++i)
    rows[i / map_count].emplace_back(tallies[i].calls, profile.seconds(tallies[i]));
  return rows;
}

}  // namespace

void bind(py::module_& m) {
  py::class_<Profile>(m, "Profile", "Where the time of meta-steps went; see csrc/executor/profile.h.")
      .def_property_readonly("meta_steps", &Profile::meta_steps)
      .def_property_readonly("within", &Profile::within)
      .def_property_readonly("seconds", [](const Profile& self) { return self.seconds(); })
      .def_property_readonly("support", [](const Profile& self) { return table_of(self, self.support()); })
      .def_property_readonly("query", [](const Profile& self) { return table_of(self, self.query()); });
  bind_type<float>(m, "MetaGradient32", "Call32");
  bind_type<double>(m, "MetaGradient64", "Call64");
}

}  // namespace fastmeta::executor
