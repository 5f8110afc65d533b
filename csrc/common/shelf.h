// Memory that calls leave behind for the next ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace fastmeta {

template <class R>
struct Memory {
  explicit Memory(std::int64_t elements)
      : size(elements), data(static_cast<R*>(::operator new(sizeof(R) * elements, std::align_val_t{64}))) {
    std::memset(data, 0, sizeof(R) * elements);  // gaps between weights stay zero
  }
  ~Memory() { ::operator delete(data, std::align_val_t{64}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  const std::int64_t size;
  R* const data;
  int seat = 0;  // who used it last
};

// What no call uses now lies here for the next one. A thread gets what it had before, which may still be in its cache:
// from another processor's cache it takes longer to fetch than a small network takes to run.
template <class T>
class Shelf {
 public:
  class Loan {
   public:
    Loan(Shelf& shelf, std::int64_t elements, int seat) : shelf_(shelf) {
      {
        std::lock_guard<std::mutex> lock(shelf_.mutex_);
        auto& free = shelf_.free_;
        auto own = std::find_if(free.begin(), free.end(), [&](const auto& thing) { return thing->seat == seat; });
        if (own == free.end() && !free.empty()) --own;
        if (own != free.end()) {
          thing_ = std::move(*own);
          free.erase(own);
        }
      }
      if (thing_ == nullptr || thing_->size < elements) {
        thing_.reset();
        thing_ = std::make_unique<T>(elements);
      }
      thing_->seat = seat;
    }
    ~Loan() {
      std::lock_guard<std::mutex> lock(shelf_.mutex_);
      shelf_.free_.push_back(std::move(thing_));
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;

    T& operator*() const { return *thing_; }

   private:
    Shelf& shelf_;
    std::unique_ptr<T> thing_;
  };

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<T>> free_;
};

}  // namespace fastmeta
