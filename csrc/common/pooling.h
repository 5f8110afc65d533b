// Pooling windows, as shapes describe them.
#pragma once

#include <cstdint>

namespace fastmeta {

enum class Pool : std::int32_t { none, max, average };

struct Pooling {
  Pool kind;
  std::int64_t kernel[2], stride[2], padding[2];
};

// Places of a window along an axis; none where it does not fit.
constexpr std::int64_t places(std::int64_t size, std::int64_t window, std::int64_t stride, std::int64_t padding) {
  const std::int64_t room = size + 2 * padding - window;
  return room < 0 ? 0 : room / stride + 1;
}

}  // namespace fastmeta
