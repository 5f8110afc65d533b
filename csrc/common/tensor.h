// What C++ asks of a PyTorch tensor, in Python's own words: the extension needs none of PyTorch's headers. For the
// files that bind it to Python alone; the interpreter's lock must be held.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "dlpack.h"

namespace fastmeta::tensor {

namespace py = pybind11;

// Attributes and methods by name, made once.
struct Names {
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* device = PyUnicode_InternFromString("device");
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

// The types whose tensors can be read at once, and how. Types derived from them may answer otherwise than their data
// lies, and are asked by name.
struct Readable {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  int (*read)(void*, dlpack::Tensor*) = nullptr;

  Readable() {
    const py::object type = py::module_::import("torch").attr("Tensor");
    const py::object capsule = py::getattr(type, dlpack::attribute, py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::capsule)) return;
    const auto* found = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::capsule));
    if (found->major != dlpack::major_version) return;
    read = found->read;
    tensor = reinterpret_cast<PyTypeObject*>(type.ptr());
    parameter = reinterpret_cast<PyTypeObject*>(py::module_::import("torch.nn").attr("Parameter").ptr());
  }
};

// Reads a tensor at once, in half the time of one attribute by name; false where it must be asked by name.
inline bool read(py::handle tensor, dlpack::Tensor& out) {
  static const Readable readable;
  const PyTypeObject* type = Py_TYPE(tensor.ptr());
  if (readable.read == nullptr || (type != readable.parameter && type != readable.tensor)) return false;
  if (readable.read(tensor.ptr(), &out) == 0) return true;
  PyErr_Clear();
  return false;
}

// Rows behind each other without gaps.
inline bool is_contiguous(const dlpack::Tensor& t) {
  std::int64_t next = 1;
  bool rows = true;
  for (int i = t.dimensions - 1; i >= 0; --i) {
    if (t.shape[i] == 0) return true;
    rows = rows && (t.shape[i] == 1 || t.strides[i] == next);
    next *= t.shape[i];
  }
  return rows;
}

inline std::uintptr_t address(const dlpack::Tensor& t) {
  return reinterpret_cast<std::uintptr_t>(t.data) + t.byte_offset;
}

inline bool is_contiguous(py::handle tensor) {
  dlpack::Tensor at_once;
  if (read(tensor, at_once)) return is_contiguous(at_once);
  return call(tensor, names().is_contiguous).ptr() == Py_True;
}

inline std::uintptr_t address(py::handle tensor) {
  dlpack::Tensor at_once;
  if (read(tensor, at_once)) return address(at_once);
  const auto value = static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(call(tensor, names().data_ptr).ptr()));
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// Addresses of the tensors of one call; copies of those that lie otherwise than kernels read them live as long.
class Addresses {
 public:
  struct Lying {
    py::handle tensor;  // the given one, or a copy without gaps
    std::uintptr_t address;
  };

  Lying contiguous(py::handle given) {
    dlpack::Tensor at_once;
    if (read(given, at_once)) {
      if (is_contiguous(at_once)) return {given, address(at_once)};
    } else if (is_contiguous(given)) {
      return {given, address(given)};
    }
    copies_.push_back(call(given, names().contiguous));
    return {copies_.back(), address(copies_.back())};
  }

 private:
  std::vector<py::object> copies_;
};

}  // namespace fastmeta::tensor
