// Where the time of meta-steps goes: how often each map of each operation ran, and how long.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <vector>

#include "../common/ticks.h"

namespace fastmeta::executor {

enum Map : int { forward_map, backward_map, tangent_map, tangent_backward_map };
constexpr int map_count = 4;

struct Tally {
  std::int64_t calls = 0, ticks = 0;
};

// Tallies of the operations of a plan, by the one thread that holds the watch. A lap is the time since the lap before
// it, or since the start; so what a sweep does between two maps counts with the first of them, steps along gradients
// and sums of cotangents included.
class Stopwatch {
 public:
  explicit Stopwatch(std::size_t operations) : tallies_(map_count * operations) {}

  void start() { last_ = ticks(); }
  void lap(std::size_t operation, Map map) {
    const std::int64_t now = ticks();
    Tally& tally = tallies_[map_count * operation + map];
    ++tally.calls;
    tally.ticks += now - last_;
    last_ = now;
  }
  const std::vector<Tally>& tallies() const { return tallies_; }

 private:
  std::vector<Tally> tallies_;  // [operations, maps]
  std::int64_t last_ = 0;
};

// The sum over tasks, threads and meta-steps, which may run at the same time.
class Profile {
 public:
  Profile(std::size_t support, std::size_t query) : support_(map_count * support), query_(map_count * query) {}

  // Of one thread; where `within` threads work on each of its tasks, they are all held for as long as it is.
  void add(const Stopwatch& support, const Stopwatch& query, int within) {
    std::lock_guard<std::mutex> lock(mutex_);
    add(support, within, support_);
    add(query, within, query_);
    within_ = within;
  }

  // A meta-step from its begin to its end by both clocks, which is what a tick's length is known from.
  class Whole {
   public:
    explicit Whole(Profile* profile) : profile_(profile) {
      if (profile_ == nullptr) return;
      begin_ = std::chrono::steady_clock::now();
      ticks_ = ticks();
    }
    ~Whole() {
      if (profile_ == nullptr) return;
      const std::int64_t passed = ticks() - ticks_;
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin_;
      std::lock_guard<std::mutex> lock(profile_->mutex_);
      profile_->ticks_ += passed;
      profile_->seconds_ += seconds.count();
      ++profile_->meta_steps_;
    }
    Whole(const Whole&) = delete;
    Whole& operator=(const Whole&) = delete;

   private:
    Profile* const profile_;
    std::chrono::steady_clock::time_point begin_;
    std::int64_t ticks_ = 0;
  };

  // To be read when no meta-step runs.
  const std::vector<Tally>& support() const { return support_; }  // [operations, maps]
  const std::vector<Tally>& query() const { return query_; }
  std::int64_t meta_steps() const { return meta_steps_; }
  int within() const { return within_; }       // threads on each task, in the last meta-step
  double seconds() const { return seconds_; }  // of all meta-steps, from begin to end
  double seconds(const Tally& tally) const {   // of threads
    return ticks_ == 0 ? 0 : seconds_ * static_cast<double>(tally.ticks) / static_cast<double>(ticks_);
  }

 private:
  static void add(const Stopwatch& watch, int within, std::vector<Tally>& to) {
    for (std::size_t i = 0; i < to.size(); ++i) {
      to[i].calls += watch.tallies()[i].calls;
      to[i].ticks += within * watch.tallies()[i].ticks;
    }
  }

  std::mutex mutex_;
  std::vector<Tally> support_, query_;
  std::int64_t meta_steps_ = 0, ticks_ = 0;
  int within_ = 1;
  double seconds_ = 0;
};

}  // namespace fastmeta::executor
