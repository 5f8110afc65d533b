// Threads that take turns where the order of what they do is part of the result.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace fastmeta::executor {

// Rows of places, each taken when all before it in its row have passed. Whoever waits has begun after those that it
// waits for, so with work of equal size it seldom does.
class Turns {
 public:
  explicit Turns(std::int64_t rows, std::int64_t first = 0) : next_(rows, first) {}

  void wait(std::int64_t row, std::int64_t place) {
    std::unique_lock<std::mutex> lock(mutex_);
    passed_.wait(lock, [&] { return stopped_ || next_[row] == place; });
    if (stopped_) throw std::runtime_error("executor: another task has failed");
  }

  void pass(std::int64_t row) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++next_[row];
    }
    passed_.notify_all();
  }

  // After a failure no turn comes; whoever waits throws.
  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
    }
    passed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable passed_;
  std::vector<std::int64_t> next_;
  bool stopped_ = false;
};

}  // namespace fastmeta::executor
