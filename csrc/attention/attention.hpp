// Causal attention inside the documents of a pack, bf16, on the CPU: what kernels/dasd_kernels/attention.py calls.
#pragma once
#include <cstdint>

namespace dasd::attention {

// Rows of a [T, heads, width] bf16 tensor whose last dimension is contiguous.
struct Heads {
  uint16_t* data;
  int64_t token_stride, head_stride;  // in elements, even
};

struct Pack {
  const int64_t* bounds;  // [documents + 1], from 0 to `tokens`
  const int64_t* order;   // the documents, longest first
  int64_t documents, tokens, heads, groups, width;  // heads is a multiple of groups, width of 64
  float scale;
};

bool supported();

// out [T, heads, width] and lse [heads, T], natural logarithm.
void forward(const Pack& pack, const Heads& q, const Heads& k, const Heads& v, const Heads& out, float* lse,
             int threads);

// dq like q, dk and dv like k; `partial` [2, heads, T, width] is scratch: every head's share of its group's dk and dv.
void backward(const Pack& pack, const Heads& q, const Heads& k, const Heads& v, const Heads& out, const float* lse,
              const Heads& dout, const Heads& dq, const Heads& dk, const Heads& dv, float* partial, int threads);

}  // namespace dasd::attention
