// What C++ asks of a PyTorch tensor, in Python's own words: the extension needs none of PyTorch's headers. For the
// files that bind it to Python alone; the interpreter's lock must be held.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastmeta::tensor {

namespace py = pybind11;

// Attributes and methods by name, made once.
struct Names {
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* device = PyUnicode_InternFromString("device");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* contiguous = PyUnicode_InternFromString("contiguous");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
};

inline const Names& names() {
  static const Names all;
  return all;
}

inline py::object result(PyObject* made) {
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

inline py::object get(py::handle tensor, PyObject* name) { return result(PyObject_GetAttr(tensor.ptr(), name)); }
inline py::object call(py::handle tensor, PyObject* name) {
  return result(PyObject_CallMethodNoArgs(tensor.ptr(), name));
}

inline bool is_contiguous(py::handle tensor) { return call(tensor, names().is_contiguous).ptr() == Py_True; }

inline std::uintptr_t address(py::handle tensor) {
  const auto value = static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(call(tensor, names().data_ptr).ptr()));
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

}  // namespace fastmeta::tensor
