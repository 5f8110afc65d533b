// The extension module fastmeta._C: what the build and the processor offer, and one bind function an op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/isa.h"

namespace py = pybind11;

namespace fastmeta::inner_update {
void bind(py::module_&);
}
namespace fastmeta::adaptive_update {
void bind(py::module_&);
}
namespace fastmeta::executor {
void bind(py::module_&);
}
namespace fastmeta::peak {
void bind(py::module_&);
}
namespace fastmeta::recall {
void bind(py::module_&);
}
namespace fastmeta::perceptron {
void bind(py::module_&);
}

namespace {

std::vector<std::string> instruction_sets(bool (*condition)(fastmeta::Isa)) {
  std::vector<std::string> names;
#define FASTMETA_NAME(isa) \
  if (condition(fastmeta::Isa::isa)) names.emplace_back(#isa);
  FASTMETA_FOR_EACH_ISA(FASTMETA_NAME)
#undef FASTMETA_NAME
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of fastmeta.";
  m.def("compiled_instruction_sets", [] { return instruction_sets(fastmeta::isa_compiled); });
  m.def("supported_instruction_sets", [] { return instruction_sets(fastmeta::isa_supported); });
  m.def("instruction_set", [] { return fastmeta::isa_name(fastmeta::isa_in_use()); });
  m.def("use_instruction_set", [](const std::string& name) { fastmeta::use_isa(name.c_str()); }, py::arg("name"));
  fastmeta::inner_update::bind(m);
  fastmeta::adaptive_update::bind(m);
  fastmeta::executor::bind(m);
  fastmeta::peak::bind(m);
  fastmeta::recall::bind(m);
  fastmeta::perceptron::bind(m);
}
