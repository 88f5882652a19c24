// The launches of pack.cu and rows.cu: one kernel each on a stream, no wait, no allocation. Addresses are the
// device's. Each returns the runtime's error text, or nullptr.
#pragma once
#include <cstdint>

namespace dasd {

// Writes the packs of a Stage whose buffer lies at `stage`.
const char* launch_packs(int device, const void* stage, int64_t packs, int64_t capacity, void* stream);

// to[i] = from[valid[i]], rows of `bytes` bytes, a multiple of 4; by 16 bytes where `bytes` and both addresses allow.
const char* launch_gather(int device, const void* from, const int64_t* valid, int64_t count, int64_t bytes, void* to,
                          void* stream);

// to[valid[i]] = from[i], and zeros in every other of the `rows` rows.
const char* launch_scatter(int device, const void* from, const int64_t* valid, int64_t count, int64_t rows,
                           int64_t bytes, void* to, void* stream);

}  // namespace dasd
