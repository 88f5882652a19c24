// What lies between the matrix products of a decoder that generates on the CPU: norms, rotation, attention over the cache,
// SwiGLU. Called from kernels/dasd_kernels/decode.py; the arithmetic is described in kernels.hpp.
//
// Rows are contiguous unless a stride is given, everything is fp32 or bf16 (`bf16`) but the rotary table, and a row's result
// depends on that row (and its cache) alone, bit for bit. Compiled once a vector width; decode_kernels() is the choice.
#pragma once
#include <cstdint>

namespace dasd {

struct Norm {
  void* x;            // [rows, width], += delta
  const void* delta;  // [rows, width] or null
  const void* weight;  // [width]
  void* out;          // [rows, width]
  int64_t rows, width;
  float eps;
};

struct Heads {  // [rows, count, dim], rows `stride` elements apart
  void* x;
  int64_t stride, rows, count, dim;
};

struct Rotation {
  const float *cos, *sin;  // [rows, dim / 2]
  const void* norm;        // [dim] weight of an RMS norm before it, or null
  float eps;
};

// One layer's cache, [cache rows, groups, room, dim]. Values lie so; keys in tiles of kTile tokens, [dim][kTile],
// so that a register holds the same dimension of several tokens. `room` is a multiple of kTile.
constexpr int64_t kTile = 16;
struct Cache {
  void *keys, *values;
  int64_t room;
};

struct DecodeKernels {
  const char* name;
  bool (*supported)();
  void (*add_rms_norm)(const Norm&, bool bf16, int threads);
  void (*rotate)(const Heads&, const Rotation&, bool bf16, int threads);
  // Keys and values of token source[i] go to slot slots[i] of cache row rows[i].
  void (*append)(const Heads& keys, const Heads& values, const int64_t* source, const int64_t* rows, const int64_t* slots,
                 int64_t count, const Cache&, bool bf16, int threads);
  // The queries of row i attend to slots 0 to last[i] of cache row i: out [rows, count, dim].
  void (*attend)(const Heads& queries, int64_t groups, const int64_t* last, const Cache&, float scale, void* out, bool bf16,
                 int threads);
  void (*swiglu)(const void* gate_up, int64_t rows, int64_t width, void* out, bool bf16, int threads);  // [rows, 2 width]
};

extern const DecodeKernels kDecodePortable, kDecodeAvx2, kDecodeAvx512;

// The widest that this CPU runs, or those of that name (null where it cannot run them).
const DecodeKernels* decode_kernels(const char* name);

}  // namespace dasd
