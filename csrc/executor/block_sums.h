// Sums over blocks of tasks, added up by the threads that computed them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "packed.h"

namespace fastmeta::executor {

// Blocks are added in pairs, pairs in pairs and so on, each by the thread that completes it: most of what is added then
// lies in that thread's own cache. Which blocks make a pair depends on their numbers alone, and so does the result.
template <class R>
class BlockSums {
 public:
  // Not initialised: the first task of a block writes, the others add.
  BlockSums(std::int64_t blocks, std::int64_t elements, const packed::Kernels<R>& kernels)
      : blocks_(blocks),
        elements_(elements),
        kernels_(kernels),
        data_(new R[blocks * elements]),
        arrived_(new std::atomic<bool>[blocks]) {
    for (std::int64_t b = 0; b < blocks; ++b) arrived_[b].store(false, std::memory_order_relaxed);
  }

  R* of(std::int64_t block) { return data_.get() + block * elements_; }

  // Once for each block, when it has all its tasks.
  void complete(std::int64_t block) {
    for (std::int64_t size = 1; size < blocks_; size *= 2) {  // of what is to be paired next
      const std::int64_t left = block - block % (2 * size), right = left + size;
      block = left;
      if (right >= blocks_) continue;
      if (!arrived_[right].exchange(true, std::memory_order_acq_rel)) return;
      kernels_.add(of(left), of(right), elements_);
    }
  }

  const R* total() { return of(0); }  // once all are complete

 private:
  const std::int64_t blocks_, elements_;
  const packed::Kernels<R>& kernels_;
  const std::unique_ptr<R[]> data_;
  const std::unique_ptr<std::atomic<bool>[]> arrived_;  // by the right one: whether half of the pair is there
};

}  // namespace fastmeta::executor
