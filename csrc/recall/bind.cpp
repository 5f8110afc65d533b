// Recognises what a meta-step was prepared for: the modules, and the kinds of tensors. At every meta-step some dozens of
// attributes are compared, which in Python takes a good part of the time of a small network's whole meta-gradient.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "../common/tensor.h"

namespace fastmeta::recall {
namespace {

namespace py = pybind11;

// Of one tensor: type, shape, dtype, device and requires_grad.
class Kind {
 public:
  explicit Kind(py::handle t)
      : type_(py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(Py_TYPE(t.ptr())))),
        grad_(tensor::get(t, tensor::names().requires_grad)) {
    dlpack::Tensor read;
    at_once_ = tensor::read(t, read);
    if (at_once_) {
      sizes_.assign(read.shape, read.shape + read.dimensions);
      code_ = read.dtype;
      place_ = read.device;
      return;
    }
    shape_ = tensor::get(t, tensor::names().shape);
    dtype_ = tensor::get(t, tensor::names().dtype);
    device_ = tensor::get(t, tensor::names().device);
  }

  bool fits(py::handle t) const {
    const auto& names = tensor::names();
    if (reinterpret_cast<PyObject*>(Py_TYPE(t.ptr())) != type_.ptr()) return false;
    if (!tensor::get(t, names.requires_grad).is(grad_)) return false;
    dlpack::Tensor read;
    if (tensor::read(t, read))
      return at_once_ && read.dtype == code_ && read.device == place_ &&
             std::equal(sizes_.begin(), sizes_.end(), read.shape, read.shape + read.dimensions);
    return !at_once_ && tensor::get(t, names.dtype).is(dtype_) && tensor::get(t, names.shape).equal(shape_) &&
           tensor::get(t, names.device).equal(device_);
  }

 private:
  py::object type_, grad_;
  bool at_once_;  // read, or asked for one by one
  std::vector<std::int64_t> sizes_;
  dlpack::DataType code_{};
  dlpack::Device place_{};
  py::object shape_, dtype_, device_;
};

class Kinds {
 public:
  explicit Kinds(const py::sequence& tensors) {
    for (const py::handle t : tensors) kinds_.emplace_back(t);
  }

  bool fit(const py::tuple& tensors) const {
    if (tensors.size() != kinds_.size()) return false;
    for (std::size_t i = 0; i < kinds_.size(); ++i)
      if (!kinds_[i].fits(PyTuple_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)))) return false;
    return true;
  }

 private:
  std::vector<Kind> kinds_;
};

// A dictionary of a module, and what it held.
class Table {
 public:
  Table(const py::object& module, const char* name, bool tensors) : now_(module.attr(name)) {
    for (const auto& [key, value] : now_) {
      then_.emplace_back(py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value));
      if (tensors && !value.is_none()) kinds_.emplace_back(value);
    }
  }

  bool same() const {
    if (static_cast<std::size_t>(PyDict_GET_SIZE(now_.ptr())) != then_.size()) return false;
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t at = 0;
    auto kind = kinds_.begin();
    for (const auto& [name, thing] : then_) {
      if (PyDict_Next(now_.ptr(), &at, &key, &value) == 0 || value != thing.ptr()) return false;
      if (key != name.ptr() && !name.equal(py::handle(key))) return false;
      if (!kinds_.empty() && !thing.is_none() && !(kind++)->fits(thing)) return false;
    }
    return true;
  }

  int visit(visitproc visit, void* arg) const {
    Py_VISIT(now_.ptr());
    for (const auto& [name, thing] : then_) Py_VISIT(thing.ptr());
    return 0;
  }

 private:
  py::dict now_;
  std::vector<std::pair<py::object, py::object>> then_;
  std::vector<Kind> kinds_;  // of those that are not None
};

// Everything about modules that preparing a meta-step reads, values of tensors excepted.
class Snapshot {
 public:
  explicit Snapshot(const py::sequence& modules) {
    for (const py::handle m : modules) {
      const auto module = py::reinterpret_borrow<py::object>(m);
      modules_.emplace_back(module, module.attr("training"));
      tables_.emplace_back(module, "_modules", false);
      tables_.emplace_back(module, "_parameters", true);
      tables_.emplace_back(module, "_buffers", true);
    }
  }

  bool holds() const {
    static PyObject* const training = PyUnicode_InternFromString("training");
    for (const auto& [module, was] : modules_)
      if (!tensor::get(module, training).is(was)) return false;
    for (const Table& table : tables_)
      if (!table.same()) return false;
    return true;
  }

  int visit(visitproc visit, void* arg) const {
    for (const auto& [module, was] : modules_) Py_VISIT(module.ptr());
    for (const Table& table : tables_)
      if (const int stop = table.visit(visit, arg)) return stop;
    return 0;
  }

  void clear() {
    modules_.clear();
    tables_.clear();
  }

 private:
  std::vector<std::pair<py::object, py::object>> modules_;
  std::vector<Table> tables_;
};

// Null while it is being made.
Snapshot* snapshot_of(PyObject* self) {
  return reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder().value_ptr<Snapshot>();
}

// A model may hold the learner that took a snapshot of it: the garbage collector must see through.
void collectable(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
    Py_VISIT(Py_TYPE(self));
    const Snapshot* snapshot = snapshot_of(self);
    return snapshot == nullptr ? 0 : snapshot->visit(visit, arg);
  };
  type.tp_clear = [](PyObject* self) -> int {
    if (Snapshot* snapshot = snapshot_of(self)) snapshot->clear();
    return 0;
  };
}

}  // namespace

void bind(py::module_& m) {
  py::class_<Kinds>(m, "Kinds", "Type, shape, dtype, device and requires_grad of some tensors.")
      .def(py::init<const py::sequence&>())
      .def("fit", &Kinds::fit, "Whether these tensors are of the same kinds.");
  py::class_<Snapshot>(m, "Snapshot", py::custom_type_setup(collectable),
                       "Everything about modules that preparing a meta-step reads, values of tensors excepted.")
      .def(py::init<const py::sequence&>())
      .def("holds", &Snapshot::holds, "Whether all of it is as it was.");
}

}  // namespace fastmeta::recall
