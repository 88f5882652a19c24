// Attention of some queries over keys and values in panels, by FlashAttention's strips (arXiv 2205.14135) with a running
// maximum. Packs (avx512_bf16.cpp) and a generator's cache (decode/avx512_bf16.cpp) call the same function, so that a query's
// result is the same bits in both: it depends on the query, the keys up to its own, and the order of these alone.
#pragma once
#include <cmath>

#include "tiles.hpp"

namespace dasd::attention {
namespace {

constexpr int64_t kQueries = 48, kStrip = 512;  // scores of 96 KB

inline __m512 powers(__m512 x) { return exp2<Avx512Lanes>(x); }

// Lanes of keys or queries first .. first + 15 that are at most (at least) `bound`.
inline __mmask16 up_to(int64_t first, int64_t bound) {
  const int64_t n = bound - first + 1;
  return static_cast<__mmask16>(n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1);
}

// One query's scores of a strip: s[count] becomes exp2(scale s - maximum) in bf16, zero after the query's own key.
inline void probabilities(const float* s, int64_t k0, int64_t query, int64_t count, float scale, float* maximum,
                          float* sum, float* correction, uint16_t* p) {
  const __m512 factor = _mm512_set1_ps(scale), lowest = _mm512_set1_ps(-INFINITY);
  __m512 top = lowest;
  for (int64_t c = 0; c < count; c += 16)
    top = _mm512_max_ps(top, _mm512_mask_mul_ps(lowest, up_to(k0 + c, query), _mm512_loadu_ps(s + c), factor));
  const float high = std::fmax(*maximum, _mm512_reduce_max_ps(top));
  const __m512 pivot = _mm512_set1_ps(high);
  __m512 total = _mm512_setzero_ps();
  for (int64_t c = 0; c < count; c += 16) {
    const __m512 e = _mm512_maskz_mov_ps(up_to(k0 + c, query),
                                         powers(_mm512_fmsub_ps(_mm512_loadu_ps(s + c), factor, pivot)));
    total = _mm512_add_ps(total, e);
    store_rounded(p + c, e);
  }
  *correction = std::exp2(*maximum - high);
  *sum = *sum * *correction + _mm512_reduce_add_ps(total);
  *maximum = high;
}

struct Queries {
  const uint16_t* data;
  int64_t stride, rows;  // at most kQueries
  int64_t first, step;   // row r sees the keys 0 to first + r * step
};

struct Panels {
  const uint16_t *keys, *values;      // keys transposed, values interleaved (tiles.hpp), zero after an odd last one
  int64_t value_panel, value_stride;  // between panels of 64 columns; between tokens of a panel
};

struct Strips {  // what a thread needs
  Buffer<uint16_t> p;
  Buffer<float> s, o;
  explicit Strips(int64_t width) : p(kQueries * kStrip), s(kQueries * kStrip), o(kQueries * width) {}
};

// out[rows, width] bf16; and the natural log-sum-exp of every row's scores where `lse` is given.
inline void attend_rows(const Queries& q, const Panels& panels, int64_t width, float scale, uint16_t* out,
                        int64_t out_stride, float* lse, Strips& strips) {
  const int64_t keys = q.first + (q.rows - 1) * q.step + 1;
  float *s = strips.s.data, *o = strips.o.data;
  float maximum[kQueries], sum[kQueries] = {}, correction;
  for (int64_t r = 0; r < q.rows; ++r) maximum[r] = -INFINITY;
  std::memset(o, 0, sizeof(float) * q.rows * width);
  for (int64_t k0 = 0; k0 < keys; k0 += kStrip) {
    const int64_t count = least(kStrip, keys - k0);
    for (int64_t c = 0; c < count; c += kLanes)
      product(q.data, q.stride, q.rows, panels.keys + (k0 + c) * width, width, s + c, kStrip, false);
    for (int64_t r = 0; r < q.rows; ++r) {
      probabilities(s + r * kStrip, k0, q.first + r * q.step, count, scale * 1.44269504f, maximum + r, sum + r,
                    &correction, strips.p.data + r * kStrip);
      if (k0 > 0)
        for (int64_t d = 0; d < width; ++d) o[r * width + d] *= correction;
    }
    for (int64_t d = 0; d < width; d += kLanes)
      product(strips.p.data, kStrip, q.rows, panels.values + d / kLanes * panels.value_panel + k0 * panels.value_stride,
              round_up(count, 2), o + d, width, true, panels.value_stride);
  }
  for (int64_t r = 0; r < q.rows; ++r) {
    const __m512 inverse = _mm512_set1_ps(1 / sum[r]);
    for (int64_t d = 0; d < width; d += 16)
      store_rounded(out + r * out_stride + d, _mm512_mul_ps(_mm512_loadu_ps(o + r * width + d), inverse));
    if (lse) lse[r] = 0.69314718f * (maximum[r] + std::log2(sum[r]));
  }
}

}  // namespace
}  // namespace dasd::attention
