// Places in one stretch of memory for buffers that are not all needed at the same time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace fastmeta::executor {

// A buffer that is needed from one point in time to another, both included.
struct Lifetime {
  std::int64_t size;
  std::int64_t first, last;
  std::int64_t* place;  // its offset, to be found
};

// Finds the places, the largest buffers first, each as low as those it lives with allow; returns the size of all.
inline std::int64_t find_places(const std::vector<Lifetime>& buffers) {
  std::vector<std::size_t> order(buffers.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return buffers[a].size > buffers[b].size; });
  std::int64_t total = 0;
  std::vector<const Lifetime*> placed;  // by place
  for (const std::size_t i : order) {
    const Lifetime& buffer = buffers[i];
    std::int64_t place = 0;
    for (const Lifetime* other : placed) {
      if (other->last < buffer.first || other->first > buffer.last) continue;
      if (place + buffer.size <= *other->place) break;
      place = std::max(place, *other->place + other->size);
    }
    *buffer.place = place;
    total = std::max(total, place + buffer.size);
    const auto behind = [](const Lifetime* a, const Lifetime* b) { return *a->place < *b->place; };
    placed.insert(std::upper_bound(placed.begin(), placed.end(), &buffer, behind), &buffer);
  }
  return total;
}

}  // namespace fastmeta::executor
