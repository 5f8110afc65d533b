// The extension module fastmeta._cuda: the CUDA kernels. It loads without a driver, and then says that there is no device.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace fastmeta::resident {
void bind(py::module_&);
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of fastmeta.";
  fastmeta::resident::bind(m);
}
