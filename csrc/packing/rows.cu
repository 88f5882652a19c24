// The rows of the hidden states that carry a label, gathered for the loss, and their gradients scattered back. A block
// is a row: it reads that row's number once, and its threads copy 16 bytes each.
#include <cuda_runtime.h>

#include "cuda.hpp"
#include "rows.hpp"

namespace dasd {
namespace {

constexpr int kThreads = 256;

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    gather_rows(const Word* __restrict__ from, const int64_t* __restrict__ valid, int64_t words, Word* __restrict__ to) {
  for (int64_t word = threadIdx.x; word < words; word += kThreads) {
    gather_word(from, valid, words, int64_t{blockIdx.x}, word, to);
  }
}

// Every row of `to` is written: no fill before it, and no two threads write the same place.
template <typename Word>
__global__ void __launch_bounds__(kThreads)
    scatter_rows(const Word* __restrict__ from, const int64_t* __restrict__ valid, int64_t count, int64_t words,
                 Word* __restrict__ to) {
  const int64_t source = row_of(valid, count, int64_t{blockIdx.x});
  for (int64_t word = threadIdx.x; word < words; word += kThreads) {
    scatter_word(from, source, words, int64_t{blockIdx.x}, word, to);
  }
}

// Calls `launch` with the word to copy by, for `rows` blocks.
template <typename Launch>
const char* by_word(int device, const void* from, const void* to, int64_t bytes, int64_t rows, Launch launch) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess && rows > 0 && bytes > 0) {
    if (by_lines(from, to, bytes)) {
      launch(Line{});
    } else {
      launch(uint32_t{});
    }
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_gather(int device, const void* from, const int64_t* valid, int64_t count, int64_t bytes, void* to,
                          void* stream) {
  return by_word(device, from, to, bytes, count, [=](auto word) {
    using Word = decltype(word);
    gather_rows<Word><<<static_cast<unsigned>(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const Word*>(from), valid, bytes / int64_t{sizeof(Word)}, static_cast<Word*>(to));
  });
}

const char* launch_scatter(int device, const void* from, const int64_t* valid, int64_t count, int64_t rows,
                           int64_t bytes, void* to, void* stream) {
  return by_word(device, from, to, bytes, rows, [=](auto word) {
    using Word = decltype(word);
    scatter_rows<Word><<<static_cast<unsigned>(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const Word*>(from), valid, count, bytes / int64_t{sizeof(Word)}, static_cast<Word*>(to));
  });
}

}  // namespace dasd
