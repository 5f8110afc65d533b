// Meta-steps of one kind, called from Python again and again: what does not change between them is handed over once.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../common/tensor.h"
#include "meta_gradient.h"

namespace fastmeta::executor {

namespace py = pybind11;

// Addresses of what a call reads, as kernels take them.
template <class R>
class Addresses : public tensor::Addresses {
 public:
  const R* of(py::handle given) { return reinterpret_cast<const R*>(contiguous(given).address); }

  // Of the first task of each leaf, whose tasks take so many bytes. Tasks may lie anywhere, each contiguous.
  std::vector<Leaf> of_leaves(const py::sequence& leaves, const std::vector<std::int64_t>& bytes) {
    std::vector<Leaf> found;
    if (leaves.size() != bytes.size()) throw std::invalid_argument("executor: a set must have the leaves of its trace");
    found.reserve(bytes.size());
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      const py::object leaf = leaves[i];
      const bool apart = !tensor::is_contiguous(leaf) && tensor::is_contiguous(leaf[py::int_(0)]);
      const std::int64_t stride =
          apart ? (leaf.attr("stride")(0) * leaf.attr("element_size")()).template cast<std::int64_t>() : bytes[i];
      const std::uintptr_t address = apart ? tensor::address(leaf) : contiguous(leaf).address;
      found.push_back({reinterpret_cast<const char*>(address), stride});
    }
    return found;
  }
};

// Where a result goes; null where it is not wanted.
template <class R>
R* place(py::handle given) {
  return given.is_none() ? nullptr : reinterpret_cast<R*>(tensor::address(given));
}

template <class R>
class Call {
 public:
  // wanted: the first so many parameters get a gradient; none at all where there is no value.
  Call(MetaGradient<R>& step, std::int64_t steps, bool first_order, bool rate_per_step, bool rate_per_parameter,
       std::vector<std::int64_t> support_bytes, std::vector<std::int64_t> query_bytes,
       std::optional<std::size_t> wanted, std::int64_t output_rows, std::int64_t output_columns)
      : step_(step),
        like_(py::module_::import("torch").attr("empty_like")),
        support_bytes_(std::move(support_bytes)),
        query_bytes_(std::move(query_bytes)),
        wanted_(wanted.value_or(0)) {
    constant_.steps = steps;
    constant_.first_order = first_order;
    constant_.rate_per_step = rate_per_step;
    constant_.rate_per_parameter = rate_per_parameter;
    constant_.gradient = wanted.has_value();
    constant_.output_rows = output_rows;
    constant_.output_columns = output_columns;
  }

  // The gradients; every other result goes where its tensor lies, and none where that is None.
  py::list run(std::int64_t tasks, py::handle alpha, const py::list& parameters, const py::sequence& support,
               const py::sequence& query, py::handle d_losses, py::handle d_alpha, py::handle loss, py::handle losses,
               py::handle support_losses, py::handle outputs, int threads, Profile* profile) const {
    Addresses<R> addresses;
    py::list gradients;
    Request<R> request = constant_;
    request.tasks = tasks;
    request.alpha = addresses.of(alpha);
    request.parameters.reserve(parameters.size());
    request.gradients.reserve(wanted_);
    std::vector<py::handle> rows;  // the parameters as kernels read them
    rows.reserve(parameters.size());
    for (const py::handle parameter : parameters) {
      const auto [tensor, address] = addresses.contiguous(parameter);
      rows.push_back(tensor);
      request.parameters.push_back(reinterpret_cast<const R*>(address));
    }
    request.support = addresses.of_leaves(support, support_bytes_);
    request.query = addresses.of_leaves(query, query_bytes_);
    request.d_losses = d_losses.is_none() ? nullptr : addresses.of(d_losses);
    request.d_alpha = place<R>(d_alpha);
    request.loss = place<R>(loss);
    request.losses = place<R>(losses);
    request.support_losses = place<R>(support_losses);
    request.outputs = place<R>(outputs);
    request.threads = threads;
    request.profile = profile;
    std::unique_ptr<py::gil_scoped_release> released;
    request.own = [&] {  // to make tensors takes as long as a small network's task: others need not wait for it
      for (std::size_t i = 0; i < wanted_; ++i) {
        const py::object gradient = tensor::result(PyObject_CallOneArg(like_.ptr(), rows[i].ptr()));
        request.gradients.push_back(place<R>(gradient));
        gradients.append(gradient);
      }
      released = std::make_unique<py::gil_scoped_release>();
    };
    step_.run(request);
    released.reset();
    return gradients;
  }

 private:
  MetaGradient<R>& step_;
  const py::object like_;
  const std::vector<std::int64_t> support_bytes_, query_bytes_;
  const std::size_t wanted_;
  Request<R> constant_{};  // with what no meta-step of this kind changes
};

}  // namespace fastmeta::executor
