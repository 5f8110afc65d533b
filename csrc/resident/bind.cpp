// Entry of the resident executor from Python: tensors and a stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/curve_of.h"
#include "../common/tensor.h"
#include "launch.h"

namespace py = pybind11;

namespace fastmeta::resident {
namespace {

using Address = std::uintptr_t;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("resident: " + what); }

Loss loss_of(const std::string& name) {
  if (name == "squared_error") return Loss::squared_error;
  if (name == "cross_entropy") return Loss::cross_entropy;
  if (name == "binary_cross_entropy") return Loss::binary_cross_entropy;
  refuse("loss must be one of three, got " + name);
}

// (in, out, activation, negative slope, number of the weight, number of the bias or -1)
using Described = std::tuple<int, int, std::string, double, int, int>;

Network network_of(const std::vector<Described>& layers, const std::string& loss, bool mean, std::int64_t ignored,
                   int support, int query) {
  Network net{{}, loss_of(loss), mean, ignored, support, query};
  if (layers.empty() || layers.size() > most_layers)
    refuse("layers must be 1 to " + std::to_string(most_layers) + ", got " + std::to_string(layers.size()));
  if (support < 1 || query < 1) refuse("support and query must have rows");
  std::set<int> numbers;
  int parameters = 0;
  for (const auto& [in, out, activation, slope, weight, bias] : layers) {
    if (in < 1 || out < 1 || (!net.layers.empty() && net.layers.back().out != in)) refuse("layers must be a chain");
    net.layers.push_back({in, out, activation_of(activation), slope, weight, bias});
    for (const int number : {weight, bias}) {
      if (number == absent && number == bias) continue;
      numbers.insert(number);
      ++parameters;
    }
  }
  if (static_cast<int>(numbers.size()) != parameters || *numbers.begin() != 0 || *numbers.rbegin() != parameters - 1)
    refuse("parameters must be numbered from 0, and read once");
  return net;
}

// Meta-steps of one kind on one device.
template <class R>
class Call {
 public:
  Call(const std::vector<Described>& layers, const std::string& loss, bool mean, std::int64_t ignored, int support,
       int query, int steps, bool gradient, bool second_order, bool learned, std::pair<int, int> rates, int adapted,
       int differentiated, int device)
      : device_(device) {
    const Network net = network_of(layers, loss, mean, ignored, support, query);
    for (const Linear& l : net.layers) parameters_ += 1 + (l.bias != absent);
    if (steps < 0 || rates.first < 1 || (rates.first > 1 && rates.first < steps)) refuse("there must be a rate a step");
    if (adapted < 0 || differentiated < adapted || differentiated > parameters_) refuse("no such parameters");
    if (rates.second != 1 && rates.second != adapted) refuse("there must be one rate, or one a parameter");
    const Kind kind{steps, gradient, second_order, learned, rates.first, rates.second, adapted, differentiated};
    plan_ = fitting_plan<R>(net, kind, shared_limit(device));
    prepare<R>(plan_, device);
  }

  std::int64_t shared_bytes() const { return plan_.elements * std::int64_t{sizeof(R)}; }
  std::int64_t gradient_elements() const { return plan_.gradient_elements; }
  int threads() const { return plan_.threads; }
  bool spilled() const { return plan_.spilled; }
  bool factored() const { return plan_.factored(); }

  std::int64_t workspace_elements(std::int64_t tasks) const {
    const auto [gradients, products, tape] = workspace(tasks);
    return gradients + products + tape + tasks;
  }

  // Tensors on the device, of the program's shapes and dtype: what is read may lie as it likes, results and the workspace,
  // of so many elements, have no gaps. None for a result that is not wanted. Where the first layer is factored, data are
  // inner products of the rows with those of the support set, and `first` has of support and query set the products with
  // the first weight, and results for the rows' coefficients in its gradient.
  void run(std::int64_t tasks, const py::list& parameters, const py::tuple& data, py::handle alpha,
           py::handle d_losses, py::handle loss, py::handle losses, py::handle support_losses, py::handle outputs,
           py::handle gradient, py::handle d_alpha, const py::tuple& first, py::handle workspace_at,
           std::int64_t elements, Address stream) const {
    if (tasks < 1) refuse("there must be tasks");
    if (static_cast<int>(parameters.size()) != parameters_ || data.size() != 4) refuse("wrong number of tensors");
    if (first.size() != (plan_.factored() ? 4 : 0)) refuse("wrong number of tensors for the first layer");
    if (elements < workspace_elements(tasks)) refuse("the workspace is too small");
    tensor::Addresses read;  // copies live until both launches are on the stream, whose memory is not given away before
    const auto of = [&](py::handle given) { return existing(read.contiguous(given).address); };
    const auto place = [](py::handle given) {
      return given.is_none() ? nullptr : reinterpret_cast<R*>(tensor::address(given));
    };
    const auto item = [](const py::tuple& from, std::size_t at) {
      return py::handle(PyTuple_GET_ITEM(from.ptr(), static_cast<Py_ssize_t>(at)));
    };
    std::vector<Address> numbered;
    for (const py::handle parameter : parameters) numbered.push_back(of(parameter));
    Tensors<R> io{};
    io.tasks = tasks;
    for (int i = 0; i < plan_.layers; ++i)
      for (int part = 0; part < 2; ++part)
        if (const int number = plan_.layer[i].parameter[part]; number != absent)
          io.parameter[i][part] = reinterpret_cast<const R*>(numbered[static_cast<std::size_t>(number)]);
    for (std::size_t i = 0; i < 2; ++i) {
      io.x[i] = reinterpret_cast<const R*>(of(item(data, 2 * i)));
      io.target[i] = reinterpret_cast<const void*>(of(item(data, 2 * i + 1)));
      if (!plan_.factored()) continue;
      io.base[i] = reinterpret_cast<const R*>(of(item(first, i)));
      io.coefficients[i] = place(item(first, 2 + i));
    }
    io.alpha = reinterpret_cast<const R*>(of(alpha));
    io.d_losses = d_losses.is_none() ? nullptr : reinterpret_cast<const R*>(of(d_losses));
    io.loss = place(loss), io.losses = place(losses), io.support_losses = place(support_losses);
    io.outputs = place(outputs), io.gradient = place(gradient), io.d_alpha = plan_.learned ? place(d_alpha) : nullptr;
    const auto [gradients, products, tape] = workspace(tasks);
    const Address free = existing(tensor::address(workspace_at));
    if (free % 16 != 0) refuse("the workspace must lie at a multiple of 16 bytes");
    io.task_gradients = reinterpret_cast<R*>(free);
    existing(reinterpret_cast<Address>(io.loss));
    if (plan_.gradient && plan_.gradient_elements > 0) existing(reinterpret_cast<Address>(io.gradient));
    io.tape = io.task_gradients + gradients;
    io.rate_products = io.tape + tape;
    if (io.losses == nullptr) io.losses = io.rate_products + products;
    const py::gil_scoped_release released;
    launch(plan_, io, device_, stream);
  }

 private:
  static Address existing(Address address) {
    if (address == 0) refuse("a tensor has no memory");
    return address;
  }

  // Elements for gradients, rates and tapes. Gradients and tapes are of whole quads, and lie first; the tasks' losses,
  // where nobody wants them, lie last.
  std::tuple<std::int64_t, std::int64_t, std::int64_t> workspace(std::int64_t tasks) const {
    return {plan_.gradient ? tasks * plan_.packed : 0, plan_.learned ? tasks * plan_.steps * plan_.layers * 2 : 0,
            plan_.spilled ? tasks * plan_.steps * plan_.tape() : 0};
  }

  Plan plan_;
  int parameters_ = 0, device_;
};

template <class R>
void bind_type(py::module_& m, const char* name) {
  using Self = Call<R>;
  py::class_<Self>(m, name, "Meta-steps of one kind; csrc/resident.")
      .def(py::init<const std::vector<Described>&, const std::string&, bool, std::int64_t, int, int, int, bool, bool,
                    bool, std::pair<int, int>, int, int, int>(),
           py::kw_only(), py::arg("layers"), py::arg("loss"), py::arg("mean"), py::arg("ignored"), py::arg("support"),
           py::arg("query"), py::arg("steps"), py::arg("gradient"), py::arg("second_order"), py::arg("learned"),
           py::arg("rates"), py::arg("adapted"), py::arg("differentiated"), py::arg("device"))
      .def_property_readonly("shared_bytes", &Self::shared_bytes)
      .def_property_readonly("gradient_elements", &Self::gradient_elements)
      .def_property_readonly("threads", &Self::threads)
      .def_property_readonly("spilled", &Self::spilled)
      .def_property_readonly("factored", &Self::factored)
      .def("workspace_elements", &Self::workspace_elements)
      .def("run", &Self::run);
}

}  // namespace

void bind(py::module_& m) {
  bind_type<float>(m, "Resident32");
  bind_type<double>(m, "Resident64");
  m.def("devices", [] {
    std::string reason;
    const int count = devices(reason);
    return std::pair<int, std::string>{count, reason};
  }, "How many devices there are, and why there is none.");
}

}  // namespace fastmeta::resident
