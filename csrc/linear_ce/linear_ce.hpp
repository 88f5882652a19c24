// A linear head's log-sum-exp, label scores and gradients on the CPU, without its [N, V] logits. Called from
// kernels/dasd_kernels/cpu.py a chunk of rows at a time; the arithmetic is described in kernels.hpp.
//
// Two calls: `forward` scores a chunk and, given a State, leaves the chunk's pivoted exponentials E there and computes
// the gradient of the hidden states; `weight_gradient` turns a State into the head's gradient, whenever it is wanted.
// Both take 2NDV FLOPs a matrix product and are compiled once an instruction set; kernels(name) is the run-time choice.
#pragma once
#include <cstdint>

namespace dasd {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct Head {
  const void* weight;  // [vocab, width], strides in elements
  Dtype dtype;
  int64_t row_stride, col_stride;
  const float* bias;  // [vocab] or null
  int64_t vocab, width;
  float softcap;  // 0: none
};

struct Rows {
  const void* x;  // [count, width], contiguous
  Dtype dtype;
  int64_t count;
  const int64_t* labels;             // in [0, vocab)
  const float* inverse_temperature;  // [count]
  const float* coefficient;          // [count], what multiplies a row's loss; read with a State only
  float z_loss;
  float label_smoothing;  // of the label's own entry; what it gives to all entries is of rank 1, and the caller's
};

struct Scores {  // [count]; entropy and rank may be null
  float *nll, *lse, *entropy;
  int64_t* rank;
};

// Sizes for a chunk: ld(count) elements a row of E, panel_elements(count, width) of `xs`, ld(width) floats a row of dx.
struct State {
  void* e;           // [vocab, ld(count)] in the kernels' element type: S dloss/dlogit, transposed
  void* xs;          // hidden states times `factor`, packed for the product
  float* dx;         // [count, ld(width)] gradient of the hidden states, or null
  float* factor;     // [count] coefficient / S and what goes with it: E's row scale
  float* hit;        // [count] the label's entry of E, exactly
  float* hit_saved;  // [count] the same as it is stored in E
};

// `out` may lie over E, which is spent then: w bytes a row of out, e of E, E at least
// max(0, vocab * (w - e)) + threads * block * max(w, e) behind out's start (weight_gradient writes behind what it has read).
struct Output {  // out (+)= scale * (previous + product + everywhere)
  void* out;     // [vocab, width], contiguous
  Dtype dtype;
  const float* previous;  // [vocab, width] or null; may be `out`
  const float* everywhere;  // [width], for every row, or null
  float scale;
  bool accumulate;
  float* bias;  // [vocab], += the bias's gradient times scale, or null
};

struct Kernels {
  const char* name;
  int element_size;    // of E and xs: 4 (fp32) or 2 (bf16)
  int64_t panel;       // tokens or columns that a register tile spans
  int64_t block;       // rows of the head's gradient that a thread makes at a time
  bool (*supported)();
  void (*forward)(const Head&, const Rows&, const Scores&, const State*, int threads);
  void (*weight_gradient)(const Head&, const Rows&, const State&, const Output&, int threads);
};

extern const Kernels kPortable, kAvx2, kAvx512, kAvx512Bf16;

// The named kernels, or null where this CPU or build has none of that name.
const Kernels* kernels(const char* name);

}  // namespace dasd
