// A decoder that generates on the CPU: norms, rotation, attention over the cache and over a pack, SwiGLU, and with AVX512-BF16
// the matrix products of a few rows. Called from kernels/dasd_kernels/decode.py; the arithmetic is described in kernels.hpp.
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
  float* inverse;     // [rows] 1 / sqrt(mean(x²) + eps), or null
  int64_t rows, width;
  float eps;
};

struct Heads {  // [rows, count, dim], rows `stride` elements apart
  void* x;
  int64_t stride, rows, count, dim;
};

struct Rotation {
  const float *cos, *sin;  // [rows, dim / 2]
  float sign;              // -1 turns back
  const void* norm;        // [dim] weight of an RMS norm before it, in place, or null
  float eps;
  void* out;  // as the heads, rows `stride` apart; may be the heads themselves
  int64_t stride;
};

// One layer's cache, [cache rows, groups, room, dim], `room` a multiple of kTokens. How a row's tokens lie in each kTokens of
// them is the kernels' own affair (see append in kernels.hpp and avx512_bf16.cpp).
constexpr int64_t kTokens = 64;
struct Cache {
  void *keys, *values;
  int64_t room;
};

struct PackGradients {
  const int64_t* order;            // the documents, longest first
  const float *out, *lse, *dout;   // as attend_pack's
  float *dq, *dk, *dv;             // [rows, count, dim], of keys and values [rows, their count, dim]
  float* partial;                  // [2, rows, count, dim] for keys of several heads: what each of these adds to dk and dv
};

// x [rows, depth] bf16, times the rows of one weight, or of two (gated): out = x weightᵀ + bias in bf16 or fp32, or
// silu(x gateᵀ + bias) * (x upᵀ + bias) in bf16. Every sum and silu is rounded to bf16 as F.linear and swiglu do.
struct Linear {
  const uint16_t* x;
  int64_t rows, depth, width;  // depth is even; width: of out
  const uint16_t *panels, *bias;  // as `pack` made them; [width] or [2, width], or null
  bool gated;
  void* out;  // [rows, width]
  bool fp32;
};

struct DecodeKernels {
  const char* name;
  bool (*supported)();
  void (*add_rms_norm)(const Norm&, bool bf16, int threads);
  void (*rotate)(const Heads&, const Rotation&, bool bf16, int threads);
  // Keys and values of token source[i] go to slot slots[i] of cache row rows[i]; slots of a row come in rising order.
  void (*append)(const Heads& keys, const Heads& values, const int64_t* source, const int64_t* rows, const int64_t* slots,
                 int64_t count, const Cache&, bool bf16, int threads);
  // Row i's key and value go to slot last[i] of cache row i, and its queries attend to slots 0 to last[i]: out [rows, count,
  // dim].
  void (*attend_next)(const Heads& queries, const Heads& keys, const Heads& values, const int64_t* last, const Cache&,
                      float scale, void* out, bool bf16, int threads);
  // Causal attention inside the documents bounds[i] to bounds[i + 1] of a pack: out [rows, count, dim], and where it is given
  // lse [count, rows], the natural log-sum-exp of scores.
  void (*attend_pack)(const Heads& queries, const Heads& keys, const Heads& values, const int64_t* bounds,
                      int64_t documents, float scale, void* out, float* lse, bool bf16, int threads);
  // Its gradients, fp32, dim a multiple of 16.
  void (*attend_pack_backward)(const Heads& queries, const Heads& keys, const Heads& values, const int64_t* bounds,
                               int64_t documents, float scale, const PackGradients&, int threads);
  // silu(gate) * up, silu rounded first: rows of gate and up are `stride` apart, out [rows, width].
  void (*swiglu)(const void* gate, const void* up, int64_t stride, int64_t rows, int64_t width, void* out, bool bf16,
                 int threads);
  // Products of bf16; null where the CPU has no instruction for them.
  int64_t panel;  // outputs are packed by so many
  void (*pack)(const uint16_t* weight, int64_t width, int64_t depth, bool gated, uint16_t* panels, int threads);
  void (*linear)(const Linear&, int threads);
};

extern const DecodeKernels kDecodePortable, kDecodeAvx2, kDecodeAvx512, kDecodeAvx512Bf16;

// The widest that this CPU runs, or those of that name (null where it cannot run them).
const DecodeKernels* decode_kernels(const char* name);

}  // namespace dasd
