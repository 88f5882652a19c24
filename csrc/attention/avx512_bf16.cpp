// Attention with AVX512-BF16. A task is one document and one head, longest documents first; nothing is shared between
// tasks, so a document's result depends neither on its neighbours nor on the threads.
//
// Forward, FlashAttention's (arXiv 2205.14135): 48 queries at a time over strips of 512 keys, with a running maximum;
// keys after the last query are not touched. Backward: 64 queries (lanes) and 96 keys (rows) at a time, on transposed
// scores, so that every operand of its five products is written by the rows it was computed in:
//
//   Sᵀ = K Qᵀ,  dPᵀ = V dOᵀ,  P = exp(S - lse),  dS = P (dP - rowsum(dO O)) scale
//   dV += Pᵀ dO,  dK += dSᵀ Q,  dQᵀ += Kᵀ dSᵀ
//
// P and dS are rounded to bf16 for the products, as in every flash attention; sums are fp32.
#include <cmath>

#include "attention.hpp"
#include "strips.hpp"

namespace dasd::attention {
namespace {

constexpr int64_t kKeys = 96;      // backward: by kLanes queries
constexpr float kNoQuery = 1e30f;  // an lse that makes every probability 0

inline Heads at(const Heads& x, int64_t token, int64_t head) {
  return {x.data + token * x.token_stride + head * x.head_stride, x.token_stride, x.head_stride};
}

inline __mmask16 from(int64_t first, int64_t bound) { return static_cast<__mmask16>(~up_to(first, bound - 1)); }

struct ForwardScratch {
  Buffer<uint16_t> keys, values;
  Strips strips;
  ForwardScratch(int64_t longest, int64_t width)
      : keys(round_up(longest, kLanes) * width), values(round_up(longest, 2) * width), strips(width) {}
};

void forward_task(const Pack& pack, const Heads& q, const Heads& k, const Heads& v, const Heads& out, float* lse,
                  int64_t length, ForwardScratch& scratch) {
  const int64_t width = pack.width;
  transposed(k.data, k.token_stride, length, width, scratch.keys.data);
  interleaved(v.data, v.token_stride, length, width, scratch.values.data);
  const Panels panels{scratch.keys.data, scratch.values.data, round_up(length, 2) * kLanes, kLanes};
  for (int64_t q0 = 0; q0 < length; q0 += kQueries)
    attend_rows({q.data + q0 * q.token_stride, q.token_stride, least(kQueries, length - q0), q0, 1}, panels, width,
                pack.scale, out.data + q0 * out.token_stride, out.token_stride, lse + q0, scratch.strips);
}

struct BackwardScratch {
  Buffer<uint16_t> qt, dot, qi, doi, kt;
  Buffer<float> lse, delta;
  BackwardScratch(int64_t longest, int64_t width)
      : qt(round_up(longest, kLanes) * width), dot(round_up(longest, kLanes) * width), qi(round_up(longest, 2) * width),
        doi(round_up(longest, 2) * width), kt(round_up(longest, 16) * width), lse(round_up(longest, kLanes)),
        delta(round_up(longest, kLanes)) {}
};

// out[width][ld] from rows of `width`, zero past the last row.
void turned(const uint16_t* x, int64_t stride, int64_t rows, int64_t width, uint16_t* out, int64_t ld) {
  alignas(64) int32_t offsets[16];
  for (int64_t r0 = 0; r0 < rows; r0 += 16) {
    const int64_t count = least(16, rows - r0);
    for (int64_t l = 0; l < 16; ++l) offsets[l] = static_cast<int32_t>(least(l, count - 1) * stride / 2);
    const __m512i index = _mm512_load_si512(offsets);
    for (int64_t d = 0; d < width; d += 2) {
      const __m512i two =
          _mm512_maskz_mov_epi32(up_to(0, count - 1), _mm512_i32gather_epi32(index, x + r0 * stride + d, 4));
      const __m256i low = _mm512_cvtepi32_epi16(two), high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(two, 16));
      std::memcpy(out + d * ld + r0, &low, sizeof(low));
      std::memcpy(out + (d + 1) * ld + r0, &high, sizeof(high));
    }
  }
}

// From scores and dP of `rows` keys from k0 on by 64 queries from q0 on: Pᵀ and dSᵀ in rows, and dSᵀ as a panel.
void gradients(const float* s, const float* dp, int64_t rows, int64_t k0, int64_t q0, const float* lse,
               const float* delta, float scale, uint16_t* p, uint16_t* ds, uint16_t* panel) {
  const __m512 factor = _mm512_set1_ps(scale * 1.44269504f), slope = _mm512_set1_ps(scale);
  for (int64_t c = 0; c < kLanes; c += 16) {
    const __m512 pivot = _mm512_loadu_ps(lse + c), rest = _mm512_loadu_ps(delta + c);
    for (int64_t r = 0; r < rows; r += 2) {
      __m512i both[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int64_t i = 0; i < least(2, rows - r); ++i) {
        const int64_t at = (r + i) * kLanes + c;
        const __m512 e = _mm512_maskz_mov_ps(from(q0 + c, k0 + r + i),
                                             powers(_mm512_fmsub_ps(_mm512_loadu_ps(s + at), factor, pivot)));
        const __m512 d = _mm512_mul_ps(_mm512_mul_ps(e, slope), _mm512_sub_ps(_mm512_loadu_ps(dp + at), rest));
        store_rounded(p + at, e);
        const __m256i h = rounded(d);
        std::memcpy(ds + at, &h, sizeof(h));
        both[i] = _mm512_cvtepu16_epi32(h);
      }
      store_interleaved(panel + r * kLanes + 2 * c, both[0], both[1]);
    }
  }
}

void store_turned(const float* dqt, int64_t rows, int64_t width, const Heads& dq) {
  alignas(64) int32_t offsets[16];
  for (int l = 0; l < 16; ++l) offsets[l] = static_cast<int32_t>(l * kLanes);
  const __m512i index = _mm512_load_si512(offsets);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < width; d += 16)
      store_rounded(dq.data + r * dq.token_stride + d, _mm512_i32gather_ps(index, dqt + d * kLanes + r, 4));
}

void backward_task(const Pack& pack, const Heads& q, const Heads& k, const Heads& v, const Heads& out, const float* lse,
                   const Heads& dout, const Heads& dq, float* dk, float* dv, int64_t length, BackwardScratch& x) {
  if (length == 0) return;  // a pack of no tokens has no memory to clear
  const int64_t width = pack.width, depth = round_up(length, 2), ld = round_up(length, 16);
  transposed(q.data, q.token_stride, length, width, x.qt.data);
  transposed(dout.data, dout.token_stride, length, width, x.dot.data);
  interleaved(q.data, q.token_stride, length, width, x.qi.data);
  interleaved(dout.data, dout.token_stride, length, width, x.doi.data);
  turned(k.data, k.token_stride, length, width, x.kt.data, ld);
  for (int64_t r = 0; r < round_up(length, kLanes); ++r) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; r < length && d < width; d += 16)
      sum = _mm512_fmadd_ps(as_float(dout.data + r * dout.token_stride + d),
                            as_float(out.data + r * out.token_stride + d), sum);
    x.delta.data[r] = _mm512_reduce_add_ps(sum);
    x.lse.data[r] = r < length ? lse[r] * 1.44269504f : kNoQuery;
  }
  std::memset(dk, 0, sizeof(float) * length * width);
  std::memset(dv, 0, sizeof(float) * length * width);
  Buffer<float> s(kKeys * kLanes), dp(kKeys * kLanes), dqt(width * kLanes);
  Buffer<uint16_t> p(kKeys * kLanes), ds(kKeys * kLanes), panel(kKeys * kLanes);
  for (int64_t q0 = 0; q0 < length; q0 += kLanes) {
    const int64_t queries = least(kLanes, depth - q0);
    for (int64_t k0 = 0; k0 < least(length, q0 + kLanes); k0 += kKeys) {
      const int64_t rows = least(kKeys, least(length, q0 + kLanes) - k0);
      product(k.data + k0 * k.token_stride, k.token_stride, rows, x.qt.data + q0 * width, width, s.data, kLanes, false);
      product(v.data + k0 * v.token_stride, v.token_stride, rows, x.dot.data + q0 * width, width, dp.data, kLanes,
              false);
      gradients(s.data, dp.data, rows, k0, q0, x.lse.data + q0, x.delta.data + q0, pack.scale, p.data, ds.data,
                panel.data);
      for (int64_t d = 0; d < width; d += kLanes) {
        const int64_t at = d * depth + q0 * kLanes, to = k0 * width + d;
        product(p.data, kLanes, rows, x.doi.data + at, queries, dv + to, width, true);
        product(ds.data, kLanes, rows, x.qi.data + at, queries, dk + to, width, true);
      }
      product(x.kt.data + k0, ld, width, panel.data, round_up(rows, 2), dqt.data, kLanes, k0 > 0);
    }
    store_turned(dqt.data, least(kLanes, length - q0), width, at(dq, q0, 0));
  }
}

// Sums the heads of each group, in order.
void share(const Pack& pack, const float* partial, const Heads& out, int64_t token) {
  const int64_t per = pack.heads / pack.groups;
  for (int64_t g = 0; g < pack.groups; ++g)
    for (int64_t d = 0; d < pack.width; d += 16) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t h = g * per; h < (g + 1) * per; ++h)
        sum = _mm512_add_ps(sum, _mm512_loadu_ps(partial + (h * pack.tokens + token) * pack.width + d));
      store_rounded(at(out, token, g).data + d, sum);
    }
}

int64_t longest(const Pack& pack) {
  const int64_t first = pack.documents ? pack.order[0] : 0;
  return pack.documents ? pack.bounds[first + 1] - pack.bounds[first] : 0;
}

}  // namespace

bool supported() {
  return kEmulated || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16"));
}

void forward(const Pack& pack, const Heads& q, const Heads& k, const Heads& v, const Heads& out, float* lse,
             int threads) {
  const int64_t per = pack.heads / pack.groups;
#pragma omp parallel num_threads(threads)
  {
    ForwardScratch scratch(longest(pack), pack.width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pack.documents * pack.heads; ++task) {
      const int64_t document = pack.order[task / pack.heads], h = task % pack.heads, t = pack.bounds[document];
      forward_task(pack, at(q, t, h), at(k, t, h / per), at(v, t, h / per), at(out, t, h), lse + h * pack.tokens + t,
                   pack.bounds[document + 1] - t, scratch);
    }
  }
}

void backward(const Pack& pack, const Heads& q, const Heads& k, const Heads& v, const Heads& out, const float* lse,
              const Heads& dout, const Heads& dq, const Heads& dk, const Heads& dv, float* partial, int threads) {
  const int64_t per = pack.heads / pack.groups, size = pack.heads * pack.tokens * pack.width;
#pragma omp parallel num_threads(threads)
  {
    BackwardScratch scratch(longest(pack), pack.width);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pack.documents * pack.heads; ++task) {
      const int64_t document = pack.order[task / pack.heads], h = task % pack.heads, t = pack.bounds[document];
      float* mine = partial + (h * pack.tokens + t) * pack.width;
      backward_task(pack, at(q, t, h), at(k, t, h / per), at(v, t, h / per), at(out, t, h), lse + h * pack.tokens + t,
                    at(dout, t, h), at(dq, t, h), mine, mine + size, pack.bounds[document + 1] - t, scratch);
    }
#pragma omp for schedule(static)
    for (int64_t token = 0; token < pack.tokens; ++token) {
      share(pack, partial, dk, token);
      share(pack, partial + size, dv, token);
    }
  }
}

}  // namespace dasd::attention
