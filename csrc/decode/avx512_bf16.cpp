// What AVX512-BF16 does otherwise: attention over a cache of bf16 with the products and the strips of csrc/attention, and the
// matrix products of a few rows, whose time is that of reading the weights once.
#define DASD_LANES 16
#include "kernels.hpp"

#include "attention/attention.hpp"
#include "attention/strips.hpp"

namespace dasd {
namespace {

using Bf16 = uint16_t;
using attention::kLanes;

// A cache for heads of whole 64 dimensions: in every kLanes tokens keys lie [dim / 2][kLanes][2], values [kLanes / 2][dim][2].
static_assert(kLanes == kTokens);
bool in_panels(int64_t dim) { return dim % kLanes == 0; }

void append_pair(const Bf16* k, const Bf16* v, int64_t slot, int64_t dim, Bf16* keys, Bf16* values) {
  Bf16* to = keys + slot / kLanes * kLanes * dim + slot % kLanes * 2;
  for (int64_t d = 0; d < dim; d += 2) std::memcpy(to + d * kLanes, k + d, 2 * sizeof(Bf16));
  to = values + slot / 2 * 2 * dim;
  for (int64_t d = 0; d < dim; ++d) {
    to[2 * d + slot % 2] = v[d];
    if (slot % 2 == 0) to[2 * d + 1] = 0;  // the other of the pair is not there yet, and is multiplied by 0
  }
}

void attend_next_pairs(const Heads& q, const Heads& k, const Heads& v, const int64_t* last, const Cache& cache, float scale,
                       Bf16* out, int threads) {
  const int64_t dim = q.dim, groups = k.count, shared = q.count / groups;
#pragma omp parallel num_threads(threads)
  {
    attention::Strips strips(dim);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < q.rows * groups; ++task) {
      const int64_t row = task / groups, group = task % groups, base = task * cache.room * dim;
      Bf16 *keys = static_cast<Bf16*>(cache.keys) + base, *values = static_cast<Bf16*>(cache.values) + base;
      append_pair(static_cast<const Bf16*>(k.x) + row * k.stride + group * dim,
                  static_cast<const Bf16*>(v.x) + row * v.stride + group * dim, last[row], dim, keys, values);
      for (int64_t h = group * shared; h < (group + 1) * shared; h += attention::kQueries) {
        const int64_t heads = least(attention::kQueries, (group + 1) * shared - h);
        attention::attend_rows({static_cast<const Bf16*>(q.x) + row * q.stride + h * dim, dim, heads, last[row], 0},
                               {keys, values, 2 * kLanes, dim}, dim, scale, out + (row * q.count + h) * dim, dim, nullptr,
                               strips);
      }
    }
  }
}

// Products. Weights lie in panels of 48 outputs, [depth / 2][48][2], gate and up by turns. While a panel is multiplied, the next
// one is fetched. A sum is made of chains of multiply-adds in order, as oneDNN's are (measured, and held by
// tests/kernels/test_decode.py), so that a row has the bits here that F.linear gives it in a pack; fp32 output is for logits,
// which are those of token_logprobs (linear_ce/core.hpp).
constexpr int64_t kOutputs = 48, kRows = 8, kLine = 32;  // a line of the cache in elements

int64_t chain(const Linear& l) { return l.depth > 1024 && !l.fp32 ? 1024 : 512; }

template <int R>
void multiply(const Bf16* a, int64_t lda, const Bf16* b, int64_t steps, float* z, bool add, const Bf16* ahead,
              int64_t lines) {
  __m512 acc[R][3];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) acc[i][j] = _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s, b += 2 * kOutputs) {
    __m512bh bv[3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) bv[j] = attention::pairs(b + 32 * j);
    for (int64_t l = 0; l < lines; ++l, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m512bh av = attention::broadcast_pair(a + i * lda + 2 * s);
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], av, bv[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      float* to = z + i * kOutputs + 16 * j;
      _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), acc[i][j]) : acc[i][j]);
    }
}

template <int R = kRows>
void multiply_rows(int64_t rows, const Bf16* a, int64_t lda, const Bf16* b, int64_t steps, float* z, bool add,
                   const Bf16* ahead, int64_t lines) {
  if (rows >= R) return multiply<R>(a, lda, b, steps, z, add, ahead, lines);
  if constexpr (R > 1) multiply_rows<R - 1>(rows, a, lda, b, steps, z, add, ahead, lines);
}

// z[rows][48] = x times one panel.
void multiply_panel(const Linear& l, const Bf16* panel, float* z) {
  const int64_t tiles = (l.rows + kRows - 1) / kRows, lines = (3 + tiles - 1) / tiles;  // 3 lines a step of the next panel
  for (int64_t k = 0; k < l.depth; k += chain(l)) {
    const int64_t steps = least(chain(l), l.depth - k) / 2;
    const Bf16* next = panel + (l.depth + k) * kOutputs;
    for (int64_t t = 0; t < tiles; ++t, next += lines * steps * kLine)
      multiply_rows(l.rows - t * kRows, l.x + t * kRows * l.depth + k, l.depth, panel + k * kOutputs, steps,
                    z + t * kRows * kOutputs, k > 0, next, t * lines < 3 ? lines : 0);
  }
}

void pack_linear(const Bf16* weight, int64_t width, int64_t depth, bool gated, Bf16* panels, int threads) {
  const int64_t count = round_up(width, kOutputs) / kOutputs, turns = gated ? 2 : 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count * turns; ++i) {
    const int64_t first = i / turns * kOutputs, lanes = least(kOutputs, width - first);
    const Bf16* from = weight + (i % turns * width + first) * depth;
    Bf16* to = panels + i * kOutputs * depth;
    if (lanes < kOutputs) std::memset(to, 0, sizeof(Bf16) * kOutputs * depth);
    for (int64_t k = 0; k < depth; k += 2)
      for (int64_t l = 0; l < lanes; ++l) std::memcpy(to + k * kOutputs + 2 * l, from + l * depth + k, 2 * sizeof(Bf16));
  }
}

// z[48] + bias, to bf16's precision where it is stored so.
V finished(const float* z, const Bf16* bias, int64_t lanes, bool round) {
  V v = Wide::load(z);
  if (bias) v = v + Wide::load(bias, lanes);
  return round ? Wide::rounded<Bf16>(v) : v;
}

void linear(const Linear& l, int threads) {
  const int64_t count = round_up(l.width, kOutputs) / kOutputs, turns = l.gated ? 2 : 1;
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> memory(turns * l.rows * kOutputs);
    float *z = memory.data, *up = z + l.rows * kOutputs;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < count; ++p) {
      const Bf16* panel = l.panels + p * turns * kOutputs * l.depth;
      multiply_panel(l, panel, z);
      if (l.gated) multiply_panel(l, panel + kOutputs * l.depth, up);
      for (int64_t r = 0; r < l.rows; ++r)
        for (int64_t c = 0; c < least(kOutputs, l.width - p * kOutputs); c += kWidth) {
          const int64_t at = p * kOutputs + c, lanes = l.width - at;
          V v = finished(z + r * kOutputs + c, l.bias ? l.bias + at : nullptr, lanes, !l.fp32);
          if (l.gated)
            v = Wide::rounded<Bf16>(v * sigmoid(v)) *
                finished(up + r * kOutputs + c, l.bias ? l.bias + l.width + at : nullptr, lanes, true);
          if (l.fp32) Wide::store(static_cast<float*>(l.out) + r * l.width + at, v, lanes);
          else Wide::store(static_cast<Bf16*>(l.out) + r * l.width + at, v, lanes);
        }
    }
  }
}

constexpr DecodeKernels table() {
  DecodeKernels kernels = decode_table("avx512_bf16", attention::supported);
  kernels.append = [](const Heads& keys, const Heads& values, const int64_t* source, const int64_t* rows,
                      const int64_t* slots, int64_t count, const Cache& cache, bool bf16, int threads) {
    if (!bf16) append<float>(keys, values, source, rows, slots, count, cache, threads, append_one<float>);
    else if (in_panels(keys.dim)) append<Bf16>(keys, values, source, rows, slots, count, cache, threads, append_pair);
    else append<Bf16>(keys, values, source, rows, slots, count, cache, threads, append_one<Bf16>);
  };
  kernels.attend_next = [](const Heads& q, const Heads& k, const Heads& v, const int64_t* last, const Cache& cache,
                           float scale, void* out, bool bf16, int threads) {
    if (!bf16) attend_next(q, k, v, last, cache, scale, static_cast<float*>(out), threads);
    else if (in_panels(q.dim)) attend_next_pairs(q, k, v, last, cache, scale, static_cast<Bf16*>(out), threads);
    else attend_next(q, k, v, last, cache, scale, static_cast<Bf16*>(out), threads);
  };
  kernels.panel = kOutputs;
  kernels.pack = pack_linear;
  kernels.linear = linear;
  return kernels;
}

}  // namespace

extern const DecodeKernels kDecodeAvx512Bf16 = table();

}  // namespace dasd
