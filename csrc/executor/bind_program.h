// A lowered program as Python hands it over: a dictionary, with one for each operation.
#pragma once

#include <pybind11/pybind11.h>

#include "program.h"

namespace fastmeta::executor {

// Throws std::invalid_argument for an operation that has no kernels.
Program program_of(const pybind11::dict& d);

}  // namespace fastmeta::executor
