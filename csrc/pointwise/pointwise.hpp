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
double sum_of_squares(const float* x, int64_t count, int threads);

}  // namespace dasd::pointwise
