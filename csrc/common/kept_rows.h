// Rows that something reads. Where sequences are padded to one length, nothing depends on what is computed of the
// padding: operations may then go through the other rows alone, which lie one behind the other.
#pragma once

#include <cstdint>

namespace fastmeta {

// A task's list of the rows that are kept, as the caller has it: for each of `sequences` how many come before it, and how
// many there are in all; behind these numbers, which rows they are. None of the sequences is without a row.
class KeptRows {
 public:
  KeptRows(const void* list, std::int64_t sequences)
      : list_(static_cast<const std::int64_t*>(list)), sequences_(sequences) {}

  std::int64_t before(std::int64_t sequence) const { return list_[sequence]; }
  std::int64_t count() const { return list_[sequences_]; }
  std::int64_t row(std::int64_t i) const { return list_[sequences_ + 1 + i]; }

 private:
  const std::int64_t* list_;
  std::int64_t sequences_;
};

// How many rows an operation goes through: those on the list if there is one, else all.
inline std::int64_t rows_at_work(const void* list, std::int64_t sequences, std::int64_t all) {
  return list == nullptr ? all : KeptRows(list, sequences).count();
}

}  // namespace fastmeta
