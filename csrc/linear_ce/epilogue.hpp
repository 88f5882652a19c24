// What happens to a block of logits while it lies in the cache: exponentials and their sums, on I's registers of fp32.
//
// Everything is in units of log 2 and per lane (a lane is a token): u = softcap(z + bias) * scale, scale = log2(e) /
// temperature, and e = exp2(u - pivot). The pivot is any number within some 80 log2 units of the row's largest u, so no
// maximum is kept while sums run (kernels.hpp chooses and checks it).
#pragma once
#include "core.hpp"

namespace dasd {
namespace {

// 2^x to 2e-7: 0 below -126.5, infinity from 128, NaN to NaN.
template <class I>
inline typename I::V exp2(typename I::V x) {
  using V = typename I::V;
  x = I::max(I::set(-127.f), I::min(I::set(128.f), x));
  const V n = I::round(x), f = I::sub(x, n);
  V p = I::fma(f, I::set(1.535336188319500e-4f), I::set(1.339887440266574e-3f));
  p = I::fma(p, f, I::set(9.618437357674640e-3f));
  p = I::fma(p, f, I::set(5.550332471162809e-2f));
  p = I::fma(p, f, I::set(2.402264791363012e-1f));
  p = I::fma(p, f, I::set(6.931472028550421e-1f));
  return I::times_power_of_2(I::fma(p, f, I::set(1.f)), n);
}

// tanh to 2e-7, relative: an odd polynomial near 0, 1 - 2 / (exp(2|x|) + 1) elsewhere.
template <class I>
inline typename I::V tanh(typename I::V x) {
  using V = typename I::V;
  const V a = I::max(x, I::sub(I::set(0.f), x)), q = I::mul(x, x);
  V p = I::fma(q, I::set(-5.70498872745e-3f), I::set(2.06390887954e-2f));
  p = I::fma(p, q, I::set(-5.37397155531e-2f));
  p = I::fma(p, q, I::set(1.33314422036e-1f));
  p = I::fma(p, q, I::set(-3.33332819422e-1f));
  const V small = I::fma(I::mul(p, q), x, x);
  const V e = exp2<I>(I::mul(a, I::set(2.885390081777927f)));
  const V large = I::sub(I::set(1.f), I::div(I::set(2.f), I::add(e, I::set(1.f))));
  return I::where_less(a, I::set(0.625f), small, I::where_less(x, I::set(0.f), I::sub(I::set(0.f), large), large));
}

// z -> softcap(z + bias), and tanh of it for the slope 1 - t².
template <class I>
inline typename I::V cap(typename I::V z, float bias, float softcap, typename I::V* t) {
  z = I::add(z, I::set(bias));
  if (softcap == 0.f) return z;
  *t = tanh<I>(I::div(z, I::set(softcap)));
  return I::mul(*t, I::set(softcap));
}

struct Lanes {  // per token of a chunk, padded to whole panels
  float *scale, *pivot;
  float *logit, *target;  // the label's softcap(z + bias), and u - pivot of it
};

struct Partial {  // per token, of one part of the vocabulary; weighted (sum of e * log2 e) and above may be null
  float *sum, *weighted, *above;
};

// A block of logits z[rows, columns], whose first row is entry `v` and first column token `t`: adds to the partial sums and,
// where `e` is given, stores e times the softcap's slope, [vocab, ld].
template <class I, bool Plain>
void exponentials(const float* z, int64_t ldz, int64_t rows, int64_t columns, int64_t v, int64_t t, const float* bias,
                  float softcap, const Lanes& lanes, const Partial& out, typename I::Elem* e, int64_t lde) {
  using V = typename I::V;
  for (int64_t c = 0; c < columns; c += I::kWidth) {
    const V scale = I::load(lanes.scale + t + c), pivot = I::load(lanes.pivot + t + c);
    const V target = I::load(lanes.target + t + c);
    V sum = I::set(0.f), weighted = I::set(0.f), above = I::set(0.f);
    for (int64_t r = 0; r < rows; ++r) {
      V u = I::load(z + r * ldz + c), slope = I::set(0.f);
      if constexpr (!Plain) u = cap<I>(u, bias ? bias[v + r] : 0.f, softcap, &slope);
      const V x = I::fms(u, scale, pivot);
      V y = exp2<I>(x);
      sum = I::add(sum, y);
      if constexpr (!Plain) {
        if (out.weighted) weighted = I::fma(y, I::max(I::set(-127.f), x), weighted);
        if (out.above) above = I::count_greater(x, target, above);
        if (softcap != 0.f) y = I::mul(y, I::fnma(slope, slope, I::set(1.f)));
      }
      if (e) I::store_element(e + (v + r) * lde + t + c, y);
    }
    I::store(out.sum + t + c, I::add(I::load(out.sum + t + c), sum));
    if (!Plain && out.weighted) I::store(out.weighted + t + c, I::add(I::load(out.weighted + t + c), weighted));
    if (!Plain && out.above) I::store(out.above + t + c, I::add(I::load(out.above + t + c), above));
  }
}

// largest[t...] = max(largest, u) over a block; `bias` holds the entries of its rows.
template <class I>
void maxima(const float* z, int64_t ldz, int64_t rows, int64_t columns, int64_t t, const float* bias, float softcap,
            const Lanes& lanes, float* largest) {
  using V = typename I::V;
  for (int64_t c = 0; c < columns; c += I::kWidth) {
    const V scale = I::load(lanes.scale + t + c);
    V top = I::load(largest + t + c), unused = I::set(0.f);
    for (int64_t r = 0; r < rows; ++r) {
      const V u = cap<I>(I::load(z + r * ldz + c), bias ? bias[r] : 0.f, softcap, &unused);
      top = I::max(top, I::mul(u, scale));
    }
    I::store(largest + t + c, top);
  }
}

}  // namespace
}  // namespace dasd
