// The open bins of a best-fit packer, kept by remaining capacity. A bitmap with 64 children a node says which
// remainders have a bin (three words are read for a capacity of 65,536), a linked stack a remainder holds the
// bins.
#pragma once
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace dasd {

class OpenBins {
 public:
  // All memory comes zeroed from the system, so a large capacity costs only the pages it touches.
  explicit OpenBins(int64_t capacity) : head_(zeroed<int32_t>(capacity + 1)) {
    for (int64_t words = capacity / 64 + 1;; words = (words + 63) / 64) {
      levels_.push_back({zeroed<uint64_t>(words), words});
      if (words == 1) break;
    }
  }

  // push and pop touch every level whether it changes or not: a store is cheaper than a mispredicted branch.
  void push(int64_t remaining, int32_t bin) {
    if (static_cast<size_t>(bin) >= next_.size()) next_.resize(static_cast<size_t>(bin) + 1);
    next_[bin] = std::exchange(head_[remaining], bin + 1);
    for (Level& level : levels_) {
      level.bits[remaining >> 6] |= uint64_t{1} << (remaining & 63);
      remaining >>= 6;
    }
  }

  int32_t pop(int64_t remaining) {  // the newest bin with this remainder, which must exist
    const int32_t bin = head_[remaining] - 1;
    head_[remaining] = next_[bin];
    uint64_t empty = next_[bin] == 0;
    for (Level& level : levels_) {
      uint64_t& word = level.bits[remaining >> 6];
      word &= ~(empty << (remaining & 63));
      empty = word == 0;
      remaining >>= 6;
    }
    return bin;
  }

  // The smallest remaining capacity >= length that a bin has, or -1.
  int64_t best_fit(int64_t length) const {
    int64_t i = length;
    for (size_t level = 0; level < levels_.size(); ++level) {
      const int64_t word = i >> 6;
      if (word >= levels_[level].words) return -1;
      const uint64_t found = levels_[level].bits[word] & (~uint64_t{0} << (i & 63));
      if (found) {
        i = word * 64 + std::countr_zero(found);
        while (level-- > 0) i = i * 64 + std::countr_zero(levels_[level].bits[i]);
        return i;
      }
      i = word + 1;
    }
    return -1;
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  template <typename T>
  using Zeroed = std::unique_ptr<T[], Free>;
  struct Level {
    Zeroed<uint64_t> bits;
    int64_t words;
  };

  template <typename T>
  static Zeroed<T> zeroed(int64_t count) {
    Zeroed<T> memory(static_cast<T*>(std::calloc(static_cast<size_t>(count), sizeof(T))));
    if (!memory) throw std::bad_alloc();
    return memory;
  }

  std::vector<Level> levels_;
  Zeroed<int32_t> head_;       // by remaining capacity: the newest bin + 1, or 0
  std::vector<int32_t> next_;  // by bin: the bin below it + 1, or 0
};

}  // namespace dasd
