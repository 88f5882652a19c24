// A step's packs in one launch: blockIdx.y is the pack, a thread writes four positions (write_four of index.hpp).
#include <cuda_runtime.h>

#include "cuda.hpp"
#include "stage.hpp"

namespace dasd {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) write_packs(const Job* __restrict__ jobs) {
  const Job job = jobs[blockIdx.y];
  // What pointers from memory point to is not known otherwise, and generic loads are slower.
  __builtin_assume(__isGlobal(job.pack.segments));
  __builtin_assume(__isGlobal(job.pack.spans));
  __builtin_assume(__isGlobal(job.out.tokens));
  __builtin_assume(__isGlobal(job.out.labels));
  __builtin_assume(__isGlobal(job.out.positions));
  __builtin_assume(__isGlobal(job.out.valid));
  const int64_t t = 4 * (int64_t{blockIdx.x} * kThreads + threadIdx.x);
  if (t < job.pack.capacity) write_four(job.pack, static_cast<int32_t>(t), job.out);
}

}  // namespace

const char* launch_packs(int device, const void* stage, int64_t packs, int64_t capacity, void* stream) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    const dim3 grid(static_cast<unsigned>((capacity + 4 * kThreads - 1) / (4 * kThreads)), static_cast<unsigned>(packs));
    write_packs<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const Job*>(stage));
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace dasd
