// The matrix products inside attention, and how their operands lie: AVX512-BF16, fp32 accumulators.
//
//   A   rows of bf16 in pairs along the depth, `lda` elements apart
//   B   panels of 64 lanes, [depth / 2][64][2]
//
// Two ways to a panel: lanes are tokens and the depth runs along their heads' width (transposed), or lanes are 64 of
// the width and the depth runs along tokens (interleaved).
#pragma once
#include "../linear_ce/avx512.hpp"

namespace dasd::attention {
namespace {

constexpr int64_t kLanes = 64, kTileRows = 6;

inline __m512bh pairs(const void* p) {
  __m512bh b;
  std::memcpy(&b, p, sizeof(b));
  return b;
}

inline __m512bh broadcast_pair(const uint16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  const __m512i wide = _mm512_set1_epi32(pair);
  return pairs(&wide);
}

template <int R>
void tile(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
          bool add) {
  __m512 acc[R][4];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[i][j] = add ? _mm512_loadu_ps(c + i * ldc + 16 * j) : _mm512_setzero_ps();
  for (int64_t s = 0; s < depth; s += 2) {
    __m512bh bv[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) bv[j] = pairs(b + s * ldb + 32 * j);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const __m512bh av = broadcast_pair(a + i * lda + s);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], av, bv[j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(c + i * ldc + 16 * j, acc[i][j]);
}

template <int R = kTileRows>
void tile_rows(int64_t rows, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t depth, float* c,
               int64_t ldc, bool add) {
  if (rows >= R) return tile<R>(a, lda, b, ldb, depth, c, ldc, add);
  if constexpr (R > 1) tile_rows<R - 1>(rows, a, lda, b, ldb, depth, c, ldc, add);
}

// C[rows, 64] (+)= A · B over an even depth; B's pairs of depth are 2 `ldb` elements apart.
inline void product(const uint16_t* a, int64_t lda, int64_t rows, const uint16_t* b, int64_t depth, float* c,
                    int64_t ldc, bool add, int64_t ldb = kLanes) {
  for (int64_t r = 0; r < rows; r += kTileRows)
    tile_rows(rows - r, a + r * lda, lda, b, ldb, depth, c + r * ldc, ldc, add);
}

inline __m512i widened(const uint16_t* p) {  // 16 bf16 in the lower halves of 16 lanes
  __m256i h;
  std::memcpy(&h, p, sizeof(h));
  return _mm512_cvtepu16_epi32(h);
}

inline __m512 as_float(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(widened(p), 16)); }

inline __m256i rounded(__m512 a) {
  const __m256bh h = _mm512_cvtneps_pbh(a);
  __m256i bits;
  std::memcpy(&bits, &h, sizeof(bits));
  return bits;
}

inline void store_rounded(uint16_t* p, __m512 a) {
  const __m256i h = rounded(a);
  std::memcpy(p, &h, sizeof(h));
}

// out[lane] = (a[lane], b[lane])
inline void store_interleaved(uint16_t* p, __m512i a, __m512i b) {
  const __m512i both = _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
  std::memcpy(p, &both, sizeof(both));
}

// Panels over tokens, [ceil(rows / 64)][width / 2][64][2], zero past the last row.
inline void transposed(const uint16_t* x, int64_t stride, int64_t rows, int64_t width, uint16_t* out) {
  alignas(64) int32_t at[16];
  for (int64_t r0 = 0; r0 < rows; r0 += 16) {
    const int64_t count = least(16, rows - r0);
    for (int64_t l = 0; l < 16; ++l) at[l] = static_cast<int32_t>(least(l, count - 1) * stride / 2);
    const __m512i index = _mm512_load_si512(at);
    const __mmask16 present = static_cast<__mmask16>((1u << count) - 1);
    uint16_t* to = out + r0 / kLanes * width * kLanes + r0 % kLanes * 2;
    for (int64_t s = 0; s < width; s += 2)
      _mm512_storeu_si512(to + s * kLanes, _mm512_maskz_mov_epi32(
                                               present, _mm512_i32gather_epi32(index, x + r0 * stride + s, 4)));
  }
  for (int64_t r0 = round_up(rows, 16); r0 < round_up(rows, kLanes); r0 += 16)
    for (int64_t s = 0; s < width; s += 2)
      std::memset(out + r0 / kLanes * width * kLanes + s * kLanes + r0 % kLanes * 2, 0, 64);
}

// Panels over the width, [ceil(width / 64)][depth / 2][64][2] with depth = rows rounded up to even, zero beyond.
inline void interleaved(const uint16_t* x, int64_t stride, int64_t rows, int64_t width, uint16_t* out) {
  const int64_t depth = round_up(rows, 2);
  for (int64_t r = 0; r < depth; r += 2)
    for (int64_t c = 0; c < round_up(width, kLanes); c += 16) {
      const uint16_t* from = x + r * stride + c;
      const __m512i none = _mm512_setzero_si512();
      const bool there = c < width;
      store_interleaved(out + c / kLanes * depth * kLanes + r * kLanes + c % kLanes * 2, there ? widened(from) : none,
                        there && r + 1 < rows ? widened(from + stride) : none);
    }
}

}  // namespace
}  // namespace dasd::attention
