// Copying the rows that carry a label together and back, a word at a time: what one device thread does. Word is 16
// bytes where sizes and addresses allow, else 4. Compiled for the host too, so that tests run it.
#pragma once
#include <cstdint>

#include "index.hpp"

namespace dasd {

struct alignas(16) Line {
  uint32_t a, b, c, d;
};

template <typename Word>
DASD_HD void gather_word(const Word* from, const int64_t* valid, int64_t words, int64_t row, int64_t word, Word* to) {
  to[row * words + word] = from[valid[row] * words + word];
}

// source: the row that goes to `row`, or -1 where none does.
template <typename Word>
DASD_HD void scatter_word(const Word* from, int64_t source, int64_t words, int64_t row, int64_t word, Word* to) {
  to[row * words + word] = source < 0 ? Word{} : from[source * words + word];
}

// Whether 16 bytes at a time fit.
inline bool by_lines(const void* from, const void* to, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(bytes)) % 16 == 0;
}

// The kernels' work in loops on the host, for tests.
template <typename Word>
void gather_all(const Word* from, const int64_t* valid, int64_t count, int64_t words, Word* to) {
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t word = 0; word < words; ++word) gather_word(from, valid, words, row, word, to);
  }
}

template <typename Word>
void scatter_all(const Word* from, const int64_t* valid, int64_t count, int64_t rows, int64_t words, Word* to) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t source = row_of(valid, count, row);
    for (int64_t word = 0; word < words; ++word) scatter_word(from, source, words, row, word, to);
  }
}

}  // namespace dasd
