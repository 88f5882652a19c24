// decode.hpp's calls for a vector width. All arithmetic is fp32; what a layer of torch operators would round to bf16 on the
// way (a sum of residuals, a normed or rotated head, silu) is rounded here too, so that generation follows the forward.
//
// Attention takes a row's keys and values once for all query heads that share them: scores with tokens in the lanes (see
// Cache), a softmax over all of them, then the sum of values with dimensions in the lanes. Bytes: the cache of the row, once
// for every four query heads of a group; FLOPs: 4 a query head, token and dimension.
#pragma once
#include <cmath>

#include "decode.hpp"
#include "lanes.hpp"
#include "linear_ce/epilogue.hpp"

namespace dasd {
namespace {

using V = Wide::V;
constexpr int64_t kWidth = Wide::kWidth;
constexpr int64_t kTileVecs = kTile / kWidth;
constexpr int64_t kQueries = 4;                     // query heads at a time
constexpr int64_t kSpan = kWidth == 16 ? 4 : 2;     // registers of a value at a time
constexpr int64_t kWorthAThread = 1 << 15;          // elements
constexpr float kLog2OfE = 1.44269504088896f;

inline V sigmoid(V x) { return Wide::set(1.f) / (Wide::set(1.f) + exp2<Wide>(x * -kLog2OfE)); }

template <class E>
float inverse_rms(const E* x, int64_t width, float eps) {
  V sum = Wide::set(0.f);
  for (int64_t i = 0; i < width; i += kWidth) {
    const V v = Wide::load(x + i, width - i);
    sum += v * v;
  }
  return 1.f / std::sqrt(Wide::total(sum) / static_cast<float>(width) + eps);
}

template <class E>
void scale_by(const E* x, float factor, const E* weight, int64_t width, E* out) {
  for (int64_t i = 0; i < width; i += kWidth)
    Wide::store(out + i, Wide::load(x + i, width - i) * factor * Wide::load(weight + i, width - i), width - i);
}

template <class E>
void add_rms_norm(const Norm& n, int threads) {
#pragma omp parallel for num_threads(threads) if (n.rows * n.width > kWorthAThread)
  for (int64_t row = 0; row < n.rows; ++row) {
    E* x = static_cast<E*>(n.x) + row * n.width;
    if (n.delta) {
      const E* delta = static_cast<const E*>(n.delta) + row * n.width;
      for (int64_t i = 0; i < n.width; i += kWidth)
        Wide::store(x + i, Wide::load(x + i, n.width - i) + Wide::load(delta + i, n.width - i), n.width - i);
    }
    scale_by(x, inverse_rms(x, n.width, n.eps), static_cast<const E*>(n.weight), n.width,
             static_cast<E*>(n.out) + row * n.width);
  }
}

template <class E>
void rotate(const Heads& h, const Rotation& r, int threads) {
  const int64_t half = h.dim / 2;
#pragma omp parallel for num_threads(threads) if (h.rows * h.count * h.dim > kWorthAThread)
  for (int64_t row = 0; row < h.rows; ++row) {
    E* x = static_cast<E*>(h.x) + row * h.stride;
    const float *cos = r.cos + row * half, *sin = r.sin + row * half;
    for (int64_t head = 0; head < h.count; ++head, x += h.dim) {
      if (r.norm) scale_by(x, inverse_rms(x, h.dim, r.eps), static_cast<const E*>(r.norm), h.dim, x);
      for (int64_t i = 0; i < half; i += kWidth) {
        const int64_t n = half - i;
        const V a = Wide::load(x + i, n), b = Wide::load(x + half + i, n);
        const V c = Wide::load(cos + i, n), s = Wide::load(sin + i, n);
        Wide::store(x + i, a * c - b * s, n);
        Wide::store(x + half + i, b * c + a * s, n);
      }
    }
  }
}

template <class E>
void append(const Heads& keys, const Heads& values, const int64_t* source, const int64_t* rows, const int64_t* slots,
            int64_t count, const Cache& cache, int threads) {
  const int64_t dim = keys.dim;
#pragma omp parallel for num_threads(threads) if (count * keys.count * dim > kWorthAThread)
  for (int64_t i = 0; i < count; ++i) {
    const E* k = static_cast<const E*>(keys.x) + source[i] * keys.stride;
    const E* v = static_cast<const E*>(values.x) + source[i] * values.stride;
    for (int64_t group = 0; group < keys.count; ++group, k += dim, v += dim) {
      const int64_t base = (rows[i] * keys.count + group) * cache.room * dim;
      E* to = static_cast<E*>(cache.keys) + base + slots[i] / kTile * kTile * dim + slots[i] % kTile;
      for (int64_t d = 0; d < dim; ++d) to[d * kTile] = k[d];
      std::memcpy(static_cast<E*>(cache.values) + base + slots[i] * dim, v, sizeof(E) * dim);
    }
  }
}

// scores[r][token] = q[r] · key of the token, for whole tiles.
template <class E, int64_t R>
void score(const float* q, const E* keys, int64_t tiles, int64_t dim, float* scores) {
  for (int64_t tile = 0; tile < tiles; ++tile, keys += kTile * dim) {
    V acc[R][kTileVecs] = {};
    for (int64_t d = 0; d < dim; ++d) {
      V key[kTileVecs];
      for (int64_t j = 0; j < kTileVecs; ++j) key[j] = Wide::load(keys + d * kTile + j * kWidth);
      for (int64_t r = 0; r < R; ++r)
        for (int64_t j = 0; j < kTileVecs; ++j) acc[r][j] += key[j] * q[r * dim + d];
    }
    for (int64_t r = 0; r < R; ++r)
      for (int64_t j = 0; j < kTileVecs; ++j)
        Wide::store(scores + (r * tiles + tile) * kTile + j * kWidth, acc[r][j]);
  }
}

// scores -> exp(scale * (scores - their maximum)); returns 1 / their sum. What follows `count` becomes 0.
inline float softmax(float* scores, int64_t count, int64_t padded, float scale) {
  for (int64_t t = count; t < padded; ++t) scores[t] = -INFINITY;
  V top = Wide::set(-INFINITY), sum = Wide::set(0.f);
  for (int64_t t = 0; t < padded; t += kWidth) top = Wide::max(Wide::load(scores + t), top);
  const float pivot = Wide::largest(top);
  for (int64_t t = 0; t < padded; t += kWidth) {
    const V p = exp2<Wide>((Wide::load(scores + t) - pivot) * (scale * kLog2OfE));
    Wide::store(scores + t, p);
    sum += p;
  }
  return 1.f / Wide::total(sum);
}

// out[r][d...] = inverse[r] * sum over tokens of weights[r][token] * values[token][d...], C registers of d.
template <class E, int64_t R, int64_t C>
void weigh(const float* weights, int64_t ld, const E* values, int64_t count, int64_t dim, int64_t d, const float* inverse,
           E* out) {
  V acc[R][C] = {};
  const int64_t n = dim - d - (C - 1) * kWidth;
  for (int64_t t = 0; t < count; ++t) {
    V value[C];
    for (int64_t c = 0; c < C; ++c) value[c] = Wide::load(values + t * dim + d + c * kWidth, c + 1 < C ? kWidth : n);
    for (int64_t r = 0; r < R; ++r)
      for (int64_t c = 0; c < C; ++c) acc[r][c] += value[c] * weights[r * ld + t];
  }
  for (int64_t r = 0; r < R; ++r)
    for (int64_t c = 0; c < C; ++c)
      Wide::store(out + r * dim + d + c * kWidth, acc[r][c] * inverse[r], c + 1 < C ? kWidth : n);
}

template <class E, int64_t R = kQueries>
void attend_queries(int64_t queries, const float* q, const E* keys, const E* values, int64_t count, int64_t dim,
                    float scale, float* scores, E* out) {
  if constexpr (R > 1)
    if (queries < R) return attend_queries<E, R - 1>(queries, q, keys, values, count, dim, scale, scores, out);
  const int64_t tiles = round_up(count, kTile) / kTile;
  float inverse[R];
  score<E, R>(q, keys, tiles, dim, scores);
  for (int64_t r = 0; r < R; ++r) inverse[r] = softmax(scores + r * tiles * kTile, count, tiles * kTile, scale);
  int64_t d = 0;
  for (; d + kSpan * kWidth <= dim; d += kSpan * kWidth)
    weigh<E, R, kSpan>(scores, tiles * kTile, values, count, dim, d, inverse, out);
  for (; d < dim; d += kWidth) weigh<E, R, 1>(scores, tiles * kTile, values, count, dim, d, inverse, out);
}

template <class E>
void attend(const Heads& h, int64_t groups, const int64_t* last, const Cache& cache, float scale, E* out, int threads) {
  const int64_t dim = h.dim, shared = h.count / groups;
  int64_t longest = 0;
  for (int64_t row = 0; row < h.rows; ++row) longest = last[row] > longest ? last[row] : longest;
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> scores(kQueries * round_up(longest + 1, kTile));
    Buffer<float> q(shared * dim);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < h.rows * groups; ++task) {
      const int64_t row = task / groups, first = task % groups * shared, base = task * cache.room * dim;
      const E* query = static_cast<const E*>(h.x) + row * h.stride + first * dim;
      for (int64_t i = 0; i < shared * dim; ++i) q.data[i] = from_element(query[i]);
      for (int64_t r = 0; r < shared; r += kQueries)
        attend_queries<E>(shared - r, q.data + r * dim, static_cast<const E*>(cache.keys) + base,
                          static_cast<const E*>(cache.values) + base, last[row] + 1, dim, scale, scores.data,
                          out + (row * h.count + first + r) * dim);
    }
  }
}

template <class E>
void swiglu(const E* gate_up, int64_t rows, int64_t width, E* out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > kWorthAThread)
  for (int64_t row = 0; row < rows; ++row) {
    const E *gate = gate_up + 2 * row * width, *up = gate + width;
    for (int64_t i = 0; i < width; i += kWidth) {
      const V g = Wide::load(gate + i, width - i);
      Wide::store(out + row * width + i, Wide::rounded<E>(g * sigmoid(g)) * Wide::load(up + i, width - i), width - i);
    }
  }
}

constexpr DecodeKernels decode_table(const char* name, bool (*supported)()) {
  return {
      name, supported,
      [](const Norm& n, bool bf16, int threads) {
        bf16 ? add_rms_norm<uint16_t>(n, threads) : add_rms_norm<float>(n, threads);
      },
      [](const Heads& h, const Rotation& r, bool bf16, int threads) {
        bf16 ? rotate<uint16_t>(h, r, threads) : rotate<float>(h, r, threads);
      },
      [](const Heads& keys, const Heads& values, const int64_t* source, const int64_t* rows, const int64_t* slots,
         int64_t count, const Cache& cache, bool bf16, int threads) {
        bf16 ? append<uint16_t>(keys, values, source, rows, slots, count, cache, threads)
             : append<float>(keys, values, source, rows, slots, count, cache, threads);
      },
      [](const Heads& h, int64_t groups, const int64_t* last, const Cache& cache, float scale, void* out, bool bf16,
         int threads) {
        bf16 ? attend(h, groups, last, cache, scale, static_cast<uint16_t*>(out), threads)
             : attend(h, groups, last, cache, scale, static_cast<float*>(out), threads);
      },
      [](const void* gate_up, int64_t rows, int64_t width, void* out, bool bf16, int threads) {
        bf16 ? swiglu(static_cast<const uint16_t*>(gate_up), rows, width, static_cast<uint16_t*>(out), threads)
             : swiglu(static_cast<const float*>(gate_up), rows, width, static_cast<float*>(out), threads);
      },
  };
}

}  // namespace
}  // namespace dasd
