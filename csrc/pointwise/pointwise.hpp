// The decoder's operations between its matrix products, fp32 or bf16: computed in fp32, rounded where torch's are.
#pragma once
#include <cstdint>

namespace dasd::pointwise {

// y = x * rstd * weight, rstd = 1 / sqrt(mean(x²) + eps), over rows of `width`; rstd [rows] is kept for backward.
struct Norm {
  const void *x, *weight;
  int64_t rows, width;
  bool bf16;
};
void rms_norm(const Norm& norm, float eps, void* y, float* rstd, int threads);

constexpr int64_t kNormParts = 64;  // of the rows: dweight is summed part by part, whatever the threads
// dx like x; dweight [width] like weight; `partial` [kNormParts, width] is scratch.
void rms_norm_backward(const Norm& norm, const float* rstd, const void* dy, void* dx, void* dweight, float* partial,
                       int threads);

// y = silu(gate) * up over `count` elements, silu rounded first, and its gradients.
void swiglu(const void* gate, const void* up, void* y, int64_t count, bool bf16, int threads);
void swiglu_backward(const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t count, bool bf16,
                     int threads);

// Turns the pairs (i, i + half) of every head by the angle whose cos and sin [tokens, half] are given, fp32; `sign` -1
// turns back. x [tokens, heads, 2 half], `stride` elements between tokens; y is contiguous.
void rotate(const void* x, int64_t stride, const float* cos, const float* sin, float sign, void* y, int64_t tokens,
            int64_t heads, int64_t half, bool bf16, int threads);

// Sum of squares in float64, in parts fixed by `count` alone.
double sum_of_squares(const float* x, int64_t count, int threads);

}  // namespace dasd::pointwise
