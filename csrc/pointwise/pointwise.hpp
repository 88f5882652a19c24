// The gradients of the decoder's operations between its matrix products, fp32 or bf16, computed in fp32; forward they are
// csrc/decode's kernels, which a generator runs too.
#pragma once
#include <cstdint>

namespace dasd::pointwise {

// y = x * rstd * weight, rstd = 1 / sqrt(mean(x²) + eps), over rows of `width`.
struct Norm {
  const void *x, *weight;
  int64_t rows, width;
  bool bf16;
};

constexpr int64_t kNormParts = 64;  // of the rows: dweight is summed part by part, whatever the threads
// dx like x; dweight [width] like weight; `partial` [kNormParts, width] is scratch.
void rms_norm_backward(const Norm& norm, const float* rstd, const void* dy, void* dx, void* dweight, float* partial,
                       int threads);

// y = silu(gate) * up over `count` elements, silu rounded first.
void swiglu_backward(const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t count, bool bf16,
                     int threads);

// Sum of squares in float64, in parts fixed by `count` alone.
double sum_of_squares(const void* x, int64_t count, bool bf16, int threads);

// fp32 weights, whole (`low` null) or as the nearest bf16 and, as int16, what their bits are beyond it; and AdamW's moments,
// fp32, or `compact`: int8 and bf16.
struct Weights {
  void* weight;
  uint16_t* low;
  void *first, *second;
  bool compact;
};
struct AdamW {
  float scale;  // of the gradients, before all else
  float beta1, beta2;
  float rate;   // the learning rate / (1 - beta1^step)
  float root;   // 1 / sqrt(1 - beta2^step)
  float eps;
  float decay;  // 1 - learning rate * weight decay
  uint32_t place, seed;  // of compact moments' rounding: the first weight's number, and another seed each step
};
// A step of AdamW (arXiv 1711.05101) over `count` weights; gradients are fp32 or bf16.
void adamw(const Weights& weights, const void* grad, const AdamW& options, int64_t count, bool bf16, int threads);

}  // namespace dasd::pointwise
