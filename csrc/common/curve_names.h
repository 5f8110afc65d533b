// Activation functions that fused operations know, by the numbers Python uses.
#pragma once

#include <cstdint>

namespace fastmeta {

enum class Activation : std::int32_t { identity, relu, leaky_relu, tanh, sigmoid, silu, gelu };

}  // namespace fastmeta
