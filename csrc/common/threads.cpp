#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
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

// What is left of a thread's share of a job, on a cache line of its own.
struct alignas(64) Share {
  std::atomic<std::int64_t> next{0};
  std::int64_t end = 0;
};

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

thread_local bool at_work = false;  // on a job: what it asks for now, it does alone

// A job is open for as many threads as it has seats. Who takes one does so before it looks at the job, and the caller
// waits for those alone; a thread that comes late, or not at all, costs nothing. Locks are for going to sleep.
class Pool {
 public:
  // False where another thread's job is running.
  bool run(std::int64_t n, int threads, Work work, Own own, void* context) {
    std::unique_lock<std::mutex> only(one_job_, std::try_to_lock);
    if (!only.owns_lock()) return false;
    if (workers_ < threads - 1) share_.reset(new Share[threads]);
    for (; workers_ < threads - 1; ++workers_) std::thread([this] { serve(); }).detach();
    work_ = work;
    context_ = context;
    shares_ = threads;
    grain_ = std::max<std::int64_t>(1, n / (ranges_per_thread * threads));
    for (int i = 0; i < threads; ++i) {
      share_[i].next.store(n * i / threads, std::memory_order_relaxed);
      share_[i].end = n * (i + 1) / threads;
    }
    finished_.store(0, std::memory_order_relaxed);
    const std::uint64_t job = (open_.load(std::memory_order_relaxed) / seats_limit + 1) * seats_limit;
    const std::uint64_t seats = static_cast<std::uint64_t>(threads - 1);
    open_.store(job + seats);
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    at_work = true;
    own(context);
    take_ranges(0);
    at_work = false;
    const int taken = static_cast<int>(seats - open_.exchange(job) % seats_limit);
    const auto done = [&] { return finished_.load() == taken; };
    if (watched(done)) return true;
    std::unique_lock<std::mutex> lock(mutex_);
    waits_.store(true);
    done_.wait(lock, done);
    waits_.store(false);
    return true;
  }

 private:
  static constexpr std::uint64_t seats_limit = std::uint64_t{1} << 16;

  void serve() {
    at_work = true;
    std::uint64_t seen = 0;
    for (;;) {
      const auto another = [&] {
        const std::uint64_t open = open_.load();
        return open / seats_limit != seen && open % seats_limit > 0;
      };
      if (!watched(another)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, another);
        --sleepers_;
      }
      std::uint64_t open = open_.load();
      while (open % seats_limit > 0 && !open_.compare_exchange_weak(open, open - 1)) {
      }
      if (open % seats_limit == 0) continue;
      seen = open / seats_limit;
      take_ranges(static_cast<int>(open % seats_limit));
      ++finished_;
      if (waits_.load()) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  // Its own share first: jobs of equal size that follow each other then find what they need in the thread's own cache.
  void take_ranges(int seat) {
    for (int i = 0; i < shares_; ++i) {
      Share& share = share_[(seat + i) % shares_];
      for (;;) {
        const std::int64_t first = share.next.fetch_add(grain_, std::memory_order_relaxed);
        if (first >= share.end) break;
        work_(context_, first, std::min(first + grain_, share.end), seat);
      }
    }
  }

  std::mutex one_job_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  int workers_ = 0;
  std::atomic<std::uint64_t> open_{0};  // number of the job, and seats that nobody has taken
  std::atomic<int> finished_{0}, sleepers_{0};
  std::atomic<bool> waits_{false};  // the caller sleeps
  Work work_ = nullptr;
  void* context_ = nullptr;
  std::int64_t grain_ = 1;
  int shares_ = 0;
  std::unique_ptr<Share[]> share_;
};

// Never destroyed: its threads end with the process. A forked child has none of them and makes a pool of its own.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
  Pool* current = pool.load(std::memory_order_acquire);
  if (current != nullptr) return *current;
#if defined(FASTMETA_HAS_FORK)
  const auto forget = [] { pool.store(nullptr, std::memory_order_release); };
  static const int registered = pthread_atfork(nullptr, nullptr, forget);
  static_cast<void>(registered);
#endif
  auto* made = new Pool;
  if (pool.compare_exchange_strong(current, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *current;
}

}  // namespace

void parallel_ranges(std::int64_t n, int threads, Work work, Own own, void* context) {
  threads = static_cast<int>(std::min<std::int64_t>(threads, n));
  if (threads > 1 && !at_work && the_pool().run(n, threads, work, own, context)) return;
  own(context);
  if (n > 0) work(context, 0, n, 0);
}

}  // namespace fastmeta
