// Entry of a perceptron's gradient from Python: reads PyTorch's tensors, and makes those of the results.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/curve_of.h"
#include "../common/shelf.h"
#include "../common/tensor.h"
#include "kernels.h"

namespace py = pybind11;

namespace fastmeta::perceptron {
namespace {

using Described = std::tuple<std::int64_t, std::int64_t, bool, std::string>;  // in, out, bias, activation

// Addresses of tensors that are as they must be.
class Reader : tensor::Addresses {
 public:
  template <class T>
  const T* of(py::handle given, std::int64_t elements) {
    const auto [lying, address] = contiguous(given);
    dlpack::Tensor read;
    if (tensor::read(lying, read)) {
      std::int64_t number = 1;
      for (int i = 0; i < read.dimensions; ++i) number *= read.shape[i];
      constexpr int code = std::is_floating_point_v<T> ? 2 : 0, cpu = 1;  // as DLPack numbers them
      if (read.dtype.code != code || read.device.type != cpu) number = -1;
      check(number, read.dtype.bits / 8, elements, sizeof(T));
      return reinterpret_cast<const T*>(address);
    }
    check(lying.attr("numel")().cast<std::int64_t>(), lying.attr("element_size")().cast<int>(), elements, sizeof(T));
    return reinterpret_cast<const T*>(address);
  }

 private:
  static void check(std::int64_t number, int size, std::int64_t elements, std::size_t wanted) {
    if (number != elements || static_cast<std::size_t>(size) != wanted)
      throw std::invalid_argument("perceptron: expected a tensor of " + std::to_string(elements) + " elements of " +
                                  std::to_string(wanted) + " bytes on the CPU, got another");
  }
};

template <class R>
class Perceptron {
 public:
  Perceptron(std::int64_t rows, const std::vector<Described>& layers, bool squared, bool mean, std::int64_t ignored)
      : empty_like_(py::module_::import("torch").attr("empty_like")) {
    if (layers.empty() || layers.size() > max_layers)
      throw std::invalid_argument("perceptron: there must be 1 to " + std::to_string(max_layers) + " layers, got " +
                                  std::to_string(layers.size()));
    for (const auto& [in, out, bias, activation] : layers) {
      if (rows < 1 || in < 1 || out < 1 || (!layers_.empty() && layers_.back().out != in))
        throw std::invalid_argument("perceptron: layers must be a chain, of rows and features");
      if (activation != "identity" && activation != "relu" && activation != "tanh" && activation != "sigmoid" &&
          activation_of(activation) != Activation::identity)
        throw std::invalid_argument("perceptron: of " + activation + "'s result there are no derivatives");
      layers_.push_back({in, out, bias, activation_of(activation)});
    }
    net_ = {layers_.data(), static_cast<int>(layers_.size()), rows,
            squared ? Loss::squared_error : Loss::cross_entropy, mean, ignored};
  }

  std::int64_t elements() const { return kept<R>(net_); }

  bool descend(const py::tuple& passed, const py::sequence& parameters, const py::sequence& gradients,
               py::handle ds) const {
    Reader reader;
    Passed<R> from{};
    read(passed, parameters, reader, from);
    Parameters<const R> given{};
    read_all(gradients, reader, given);
    R* to = const_cast<R*>(reader.of<R>(ds, elements()));
    const py::gil_scoped_release released;
    const Kernels<R>& kernels = of();
    const typename Shelf<Memory<R>>::Loan memory(shelf_, kernels.workspace(net_), 0);
    return kernels.descend(net_, from, given, to, (*memory).data);
  }

  py::list pull_back(const py::tuple& passed, const py::sequence& parameters, py::handle ds, const py::sequence& along,
                     std::optional<double> rate) const {
    Reader reader;
    Passed<R> from{};
    read(passed, parameters, reader, from);
    const R* kept = reader.of<R>(ds, elements());
    Cotangents<R> to{};
    to.steps = rate.has_value();
    to.rate = static_cast<R>(rate.value_or(1));
    read_all(along, reader, to.along);
    py::list results;
    for (int i = 0; i < 2 * net_.depth; ++i) {
      py::object parameter = parameters[i];
      if (!parameter.is_none() && !tensor::is_contiguous(parameter))  // results are written where they lie
        parameter = tensor::call(parameter, tensor::names().contiguous);
      if (parameter.is_none()) {
        results.append(parameter);
        continue;
      }
      const py::object result = tensor::result(PyObject_CallOneArg(empty_like_.ptr(), parameter.ptr()));
      to.results[i] = const_cast<R*>(reader.of<R>(result, numbers(i)));
      results.append(result);
    }
    const py::gil_scoped_release released;
    const Kernels<R>& kernels = of();
    const typename Shelf<Memory<R>>::Loan memory(shelf_, kernels.workspace(net_), 0);
    kernels.pull_back(net_, from, kept, to, (*memory).data);
    return results;
  }

 private:
  static const Kernels<R>& of() {
    const Table& table = table_of(isa_in_use());
    if constexpr (std::is_same_v<R, float>)
      return table.f32;
    else
      return table.f64;
  }

  std::int64_t numbers(int i) const {  // elements of a weight, or of a bias
    const Layer& layer = layers_[i / 2];
    return i % 2 == 0 ? layer.in * layer.out : layer.out;
  }

  template <class T>
  void read_all(const py::sequence& tensors, Reader& reader, T& to) const {
    if (tensors.size() != 2 * layers_.size())
      throw std::invalid_argument("perceptron: there must be a weight and a bias, or None, for each layer");
    for (int i = 0; i < 2 * net_.depth; ++i) {
      const py::object given = tensors[i];
      to[i] = given.is_none() ? nullptr : reader.of<R>(given, numbers(i));
    }
  }

  // (inputs, last, out, target), as Passed has them.
  void read(const py::tuple& passed, const py::sequence& parameters, Reader& reader, Passed<R>& to) const {
    const auto inputs = passed[0].cast<py::sequence>();
    if (inputs.size() != layers_.size() || parameters.size() != 2 * layers_.size())
      throw std::invalid_argument("perceptron: there must be an input, a weight and a bias, or None, for each layer");
    const std::int64_t rows = net_.rows, out = layers_.back().out;
    for (int l = 0; l < net_.depth; ++l) {
      to.inputs[l] = reader.of<R>(py::object(inputs[l]), rows * layers_[l].in);
      to.weights[l] = reader.of<R>(py::object(parameters[2 * l]), numbers(2 * l));
    }
    const py::object last = passed[1];
    if (last.is_none() != (layers_.back().activation == Activation::identity))
      throw std::invalid_argument("perceptron: the last activation's result must be there where there is one");
    to.last = last.is_none() ? nullptr : reader.of<R>(last, rows * out);
    to.out = reader.of<R>(py::object(passed[2]), rows * out);
    if (net_.loss == Loss::squared_error)
      to.target = reader.of<R>(py::object(passed[3]), rows * out);
    else
      to.target = reader.of<std::int64_t>(py::object(passed[3]), rows);
  }

  const py::object empty_like_;
  std::vector<Layer> layers_;
  Net net_{};
  mutable Shelf<Memory<R>> shelf_;
};

template <class R>
void bind_type(py::module_& m, const char* name) {
  using Self = Perceptron<R>;
  py::class_<Self>(m, name, "A perceptron's gradient after PyTorch's forward pass; see csrc/perceptron/kernels.h.")
      .def(py::init<std::int64_t, const std::vector<Described>&, bool, bool, std::int64_t>())
      .def_property_readonly("elements", &Self::elements)
      .def("descend", &Self::descend, "Writes dL/dz of all layers; whether the gradients are what follows from it.")
      .def("pull_back", &Self::pull_back, "The gradient's pull-back, or with a rate that of the step along it.");
}

}  // namespace

void bind(py::module_& m) {
  bind_type<float>(m, "Perceptron32");
  bind_type<double>(m, "Perceptron64");
}

}  // namespace fastmeta::perceptron
