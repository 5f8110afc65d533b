#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTMETA_PAUSE() __builtin_ia32_pause()
#else
#define FASTMETA_PAUSE() std::this_thread::yield()
#endif

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define FASTMETA_HAS_FORK 1
#endif

namespace fastmeta {
namespace {

constexpr std::int64_t ranges_per_thread = 8;  // lets a thread that was late leave its share to the others

// To wake a sleeping thread takes longer than a small network's whole meta-gradient. So a thread watches for the next
// job a little while before it sleeps, long enough for a loop that calls again and again, too short to be in the way.
constexpr auto watch = std::chrono::microseconds(200);

// Waits until `ready` or until the watch is over; says whether it became ready.
template <class F>
bool watched(F ready) {
  const auto end = std::chrono::steady_clock::now() + watch;
  do {
    for (int i = 0; i < 64; ++i) {
      if (ready()) return true;
      FASTMETA_PAUSE();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

thread_local bool is_worker = false;

class Pool {
 public:
  void run(std::int64_t n, int threads, Work work, void* context) {
    std::unique_lock<std::mutex> only(one_job_, std::try_to_lock);
    if (!only.owns_lock()) {
      work(context, 0, n, 0);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; workers_ < threads - 1; ++workers_) std::thread([this] { serve(); }).detach();
      work_ = work;
      context_ = context;
      n_ = n;
      grain_ = std::max<std::int64_t>(1, n / (ranges_per_thread * threads));
      next_.store(0, std::memory_order_relaxed);
      seats_ = threads - 1;
      ++job_;
    }
    wake_.notify_all();
    take_ranges(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      seats_ = 0;  // who has not come yet need not
    }
    if (watched([this] { return busy_.load(std::memory_order_acquire) == 0; })) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void serve() {
    is_worker = true;
    std::uint64_t seen = 0;
    for (;;) {
      watched([&] { return job_.load(std::memory_order_acquire) != seen; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return job_ != seen; });
      seen = job_;
      if (seats_ == 0) continue;
      const int seat = seats_--;
      ++busy_;
      lock.unlock();
      take_ranges(seat);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void take_ranges(int seat) {
    for (;;) {
      const std::int64_t first = next_.fetch_add(grain_, std::memory_order_relaxed);
      if (first >= n_) return;
      work_(context_, first, std::min(first + grain_, n_), seat);
    }
  }

  std::mutex one_job_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  int workers_ = 0, seats_ = 0;
  std::atomic<int> busy_{0};
  std::atomic<std::uint64_t> job_{0};
  Work work_ = nullptr;
  void* context_ = nullptr;
  std::int64_t n_ = 0, grain_ = 1;
  std::atomic<std::int64_t> next_{0};
};

// Never destroyed: its threads end with the process. A forked child has none of them and makes a pool of its own.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  Pool* current = pool.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
#if defined(FASTMETA_HAS_FORK)
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_release); });
  static_cast<void>(registered);
#endif
  auto* made = new Pool;
  if (pool.compare_exchange_strong(current, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *current;
}

}  // namespace

void parallel_ranges(std::int64_t n, int threads, Work work, void* context) {
  if (n <= 0) return;
  threads = static_cast<int>(std::min<std::int64_t>(threads, n));
  if (threads <= 1 || is_worker) {
    work(context, 0, n, 0);
    return;
  }
  the_pool().run(n, threads, work, context);
}

}  // namespace fastmeta
