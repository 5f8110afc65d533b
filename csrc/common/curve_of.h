// Activation functions by the names that Python gives them. For the files that bind to Python.
#pragma once

#include <stdexcept>
#include <string>

#include "curve_names.h"

namespace fastmeta {

inline Activation activation_of(const std::string& name) {
  const char* const names[] = {"identity", "relu", "leaky_relu", "tanh", "sigmoid", "silu", "gelu"};
  for (int i = 0; i < 7; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  throw std::invalid_argument("activation must be one of seven, got " + name);
}

}  // namespace fastmeta
