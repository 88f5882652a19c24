// decode.hpp's calls for a vector width. All arithmetic is fp32; what a layer of torch operators would round to bf16 on the
// way (a sum of residuals, a normed or rotated head, silu) is rounded here too, so that generation follows the forward.
//
// Attention takes keys and values once for some queries that share them (heads of a group, in a pack neighbouring tokens too):
// scores with tokens in the lanes, a softmax over all of them, then the sum of values with dimensions in the lanes. What a
// query does not see gets the weight 0, so its result does not tell what stood beside it. FLOPs: 4 a query, token and dimension.
#pragma once
#include <cmath>

#include "attention_backward.hpp"
#include "decode.hpp"
#include "lanes.hpp"
#include "linear_ce/epilogue.hpp"

namespace dasd {
namespace {

using V = Wide::V;
constexpr int64_t kWidth = Wide::kWidth;
constexpr int64_t kTileVecs = 2, kTile = kTileVecs * kWidth;  // tokens of a tile of keys
constexpr int64_t kQueries = kWidth == 8 ? 6 : 4;  // query heads at a time
constexpr int64_t kSpan = kWidth == 16 ? 4 : 2;     // registers of a value at a time
constexpr int64_t kWorthAThread = 1 << 15;          // elements

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
    const float inverse = inverse_rms(x, n.width, n.eps);
    if (n.inverse) n.inverse[row] = inverse;
    scale_by(x, inverse, static_cast<const E*>(n.weight), n.width, static_cast<E*>(n.out) + row * n.width);
  }
}

template <class E>
void rotate(const Heads& h, const Rotation& r, int threads) {
  const int64_t half = h.dim / 2;
#pragma omp parallel for num_threads(threads) if (h.rows * h.count * h.dim > kWorthAThread)
  for (int64_t row = 0; row < h.rows; ++row) {
    E *x = static_cast<E*>(h.x) + row * h.stride, *out = static_cast<E*>(r.out) + row * r.stride;
    const float *cos = r.cos + row * half, *sin = r.sin + row * half;
    for (int64_t head = 0; head < h.count; ++head, x += h.dim, out += h.dim) {
      if (r.norm) scale_by(x, inverse_rms(x, h.dim, r.eps), static_cast<const E*>(r.norm), h.dim, x);
      for (int64_t i = 0; i < half; i += kWidth) {
        const int64_t n = half - i;
        const V a = Wide::load(x + i, n), b = Wide::load(x + half + i, n);
        const V c = Wide::load(cos + i, n), s = Wide::load(sin + i, n) * r.sign;
        Wide::store(out + i, a * c - b * s, n);
        Wide::store(out + half + i, b * c + a * s, n);
      }
    }
  }
}

// Keys lie in tiles of kTile tokens, [dim][kTile], so that a register holds one dimension of several tokens; values as they are.
template <class E>
void put_key(const E* k, int64_t slot, int64_t dim, E* keys) {
  E* to = keys + slot / kTile * kTile * dim + slot % kTile;
  for (int64_t d = 0; d < dim; ++d) to[d * kTile] = k[d];
}

template <class E>
void append_one(const E* k, const E* v, int64_t slot, int64_t dim, E* keys, E* values) {
  put_key(k, slot, dim, keys);
  std::memcpy(values + slot * dim, v, sizeof(E) * dim);
}

// one(k, v, slot, dim, keys, values) for every token and group. A group's tokens are one thread's: they may share words.
template <class E, class One>
void append(const Heads& keys, const Heads& values, const int64_t* source, const int64_t* rows, const int64_t* slots,
            int64_t count, const Cache& cache, int threads, One one) {
  const int64_t dim = keys.dim;
#pragma omp parallel for num_threads(threads) if (count * keys.count * dim > kWorthAThread)
  for (int64_t group = 0; group < keys.count; ++group)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t base = (rows[i] * keys.count + group) * cache.room * dim;
      one(static_cast<const E*>(keys.x) + source[i] * keys.stride + group * dim,
          static_cast<const E*>(values.x) + source[i] * values.stride + group * dim, slots[i], dim,
          static_cast<E*>(cache.keys) + base, static_cast<E*>(cache.values) + base);
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

// scores -> exp(scale * (scores - their maximum)); returns 1 / their sum, and the log-sum-exp where it is asked for. What
// follows `count` becomes 0.
inline float softmax(float* scores, int64_t count, int64_t padded, float scale, float* lse) {
  for (int64_t t = count; t < padded; ++t) scores[t] = -INFINITY;
  V top = Wide::set(-INFINITY), sum = Wide::set(0.f);
  for (int64_t t = 0; t < padded; t += kWidth) top = Wide::max(Wide::load(scores + t), top);
  const float pivot = Wide::largest(top);
  for (int64_t t = 0; t < padded; t += kWidth) {
    const V p = exp2<Wide>((Wide::load(scores + t) - pivot) * (scale * kLog2OfE));
    Wide::store(scores + t, p);
    sum += p;
  }
  const float total = Wide::total(sum);
  if (lse) *lse = scale * pivot + std::log(total);
  return 1.f / total;
}

template <class E>
struct Attended {  // of one query and head
  E* out;      // [dim]
  float* lse;  // or null
};

// to[r].out[d...] = inverse[r] * sum over tokens of weights[r][token] * values[token][d...], C registers of d.
template <class E, int64_t R, int64_t C>
void weigh(const float* weights, int64_t ld, const E* values, int64_t stride, int64_t count, int64_t dim, int64_t d,
           const float* inverse, const Attended<E>* to) {
  V acc[R][C] = {};
  const int64_t n = dim - d - (C - 1) * kWidth;
  for (int64_t t = 0; t < count; ++t) {
    V value[C];
    for (int64_t c = 0; c < C; ++c) value[c] = Wide::load(values + t * stride + d + c * kWidth, c + 1 < C ? kWidth : n);
    for (int64_t r = 0; r < R; ++r)
      for (int64_t c = 0; c < C; ++c) acc[r][c] += value[c] * weights[r * ld + t];
  }
  for (int64_t r = 0; r < R; ++r)
    for (int64_t c = 0; c < C; ++c)
      Wide::store(to[r].out + d + c * kWidth, acc[r][c] * inverse[r], c + 1 < C ? kWidth : n);
}

template <class E>
struct Seen {  // keys in tiles, values `stride` apart
  const E *keys, *values;
  int64_t stride, dim;
};

// to[r] for queries q[r][dim], of which the r-th sees the first counts[r] tokens; counts do not fall.
template <class E, int64_t R = kQueries>
void attend_queries(int64_t queries, const float* q, const Seen<E>& seen, const int64_t* counts, float scale, float* scores,
                    const Attended<E>* to) {
  if constexpr (R > 1)
    if (queries < R) return attend_queries<E, R - 1>(queries, q, seen, counts, scale, scores, to);
  const int64_t dim = seen.dim, count = counts[R - 1], tiles = round_up(count, kTile) / kTile, ld = tiles * kTile;
  float inverse[R];
  score<E, R>(q, seen.keys, tiles, dim, scores);
  for (int64_t r = 0; r < R; ++r) inverse[r] = softmax(scores + r * ld, counts[r], ld, scale, to[r].lse);
  int64_t d = 0;
  for (; d + kSpan * kWidth <= dim; d += kSpan * kWidth)
    weigh<E, R, kSpan>(scores, ld, seen.values, seen.stride, count, dim, d, inverse, to);
  for (; d < dim; d += kWidth) weigh<E, R, 1>(scores, ld, seen.values, seen.stride, count, dim, d, inverse, to);
}

// The `shared` query heads of one group, of `tokens` tokens the first of which sees `count` tokens, every other one more; a
// head's lse are `lse_stride` apart from the next one's.
template <class E>
void attend_group(const E* q, int64_t q_stride, int64_t tokens, int64_t shared, const Seen<E>& seen, int64_t count,
                  float scale, float* wide, float* scores, E* out, int64_t out_stride, float* lse, int64_t lse_stride) {
  const int64_t dim = seen.dim;
  for (int64_t first = 0; first < tokens * shared; first += kQueries) {
    const int64_t n = least(kQueries, tokens * shared - first);
    int64_t counts[kQueries];
    Attended<E> to[kQueries];
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = (first + i) / shared, head = (first + i) % shared;
      counts[i] = count + token;
      to[i] = {out + token * out_stride + head * dim, lse ? lse + head * lse_stride + token : nullptr};
      for (int64_t d = 0; d < dim; ++d) wide[i * dim + d] = from_element(q[token * q_stride + head * dim + d]);
    }
    attend_queries<E>(n, wide, seen, counts, scale, scores, to);
  }
}

inline int64_t longest_of(const int64_t* counts, int64_t n) {
  int64_t longest = 0;
  for (int64_t i = 0; i < n; ++i) longest = counts[i] > longest ? counts[i] : longest;
  return longest;
}

template <class E>
void attend_next(const Heads& q, const Heads& k, const Heads& v, const int64_t* last, const Cache& cache, float scale,
                 E* out, int threads) {
  const int64_t dim = q.dim, groups = k.count, shared = q.count / groups;
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> scores(kQueries * round_up(longest_of(last, q.rows) + 1, kTile)), wide(kQueries * dim);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < q.rows * groups; ++task) {
      const int64_t row = task / groups, group = task % groups, base = task * cache.room * dim;
      E *keys = static_cast<E*>(cache.keys) + base, *values = static_cast<E*>(cache.values) + base;
      append_one(static_cast<const E*>(k.x) + row * k.stride + group * dim,
                 static_cast<const E*>(v.x) + row * v.stride + group * dim, last[row], dim, keys, values);
      attend_group(static_cast<const E*>(q.x) + row * q.stride + group * shared * dim, 0, 1, shared,
                   Seen<E>{keys, values, dim, dim}, last[row] + 1, scale, wide.data, scores.data,
                   out + (row * q.count + group * shared) * dim, 0, nullptr, 0);
    }
  }
}

// As attend_next would for one token after another: keys are put in tiles first, a document's from a whole tile on.
template <class E>
void attend_pack(const Heads& q, const Heads& k, const Heads& v, const int64_t* bounds, int64_t documents, float scale,
                 E* out, float* lse, int threads) {
  constexpr int64_t kBlock = 16;  // tokens of a task
  const int64_t dim = q.dim, groups = k.count, shared = q.count / groups;
  int64_t room = 0, blocks = 0, longest = 0;
  for (int64_t i = 0; i < documents; ++i) {
    const int64_t length = bounds[i + 1] - bounds[i];
    room += round_up(length, kTile);
    blocks += round_up(length, kBlock) / kBlock;
    longest = length > longest ? length : longest;
  }
  struct Block {
    int64_t begin, first, tokens, slot;  // of the document, of these queries, how many; the document's first slot
  };
  Buffer<Block> todo(blocks);
  for (int64_t i = 0, n = 0, slot = 0; i < documents; slot += round_up(bounds[i + 1] - bounds[i], kTile), ++i)
    for (int64_t t = bounds[i]; t < bounds[i + 1]; t += kBlock)
      todo.data[n++] = {bounds[i], t, least(kBlock, bounds[i + 1] - t), slot};
  Buffer<E> keys(groups * room * dim);
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> scores(kQueries * round_up(longest, kTile)), wide(kQueries * dim);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks * groups; ++i) {
      const Block& b = todo.data[i / groups];
      const int64_t group = i % groups;
      E* to = keys.data + (group * room + b.slot) * dim;
      for (int64_t t = b.first; t < b.first + b.tokens; ++t)
        put_key(static_cast<const E*>(k.x) + t * k.stride + group * dim, t - b.begin, dim, to);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < blocks * groups; ++i) {
      const Block& b = todo.data[(blocks * groups - 1 - i) / groups];  // a document's last, which see the most, first
      const int64_t group = (blocks * groups - 1 - i) % groups;
      const Seen<E> seen{keys.data + (group * room + b.slot) * dim,
                         static_cast<const E*>(v.x) + b.begin * v.stride + group * dim, v.stride, dim};
      attend_group(static_cast<const E*>(q.x) + b.first * q.stride + group * shared * dim, q.stride, b.tokens, shared, seen,
                   b.first - b.begin + 1, scale, wide.data, scores.data,
                   out + (b.first * q.count + group * shared) * dim, q.count * dim,
                   lse ? lse + group * shared * q.rows + b.first : nullptr, q.rows);
    }
  }
}

template <class E>
void swiglu(const E* gates, const E* ups, int64_t stride, int64_t rows, int64_t width, E* out, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > kWorthAThread)
  for (int64_t row = 0; row < rows; ++row) {
    const E *gate = gates + row * stride, *up = ups + row * stride;
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
        bf16 ? append<uint16_t>(keys, values, source, rows, slots, count, cache, threads, append_one<uint16_t>)
             : append<float>(keys, values, source, rows, slots, count, cache, threads, append_one<float>);
      },
      [](const Heads& q, const Heads& k, const Heads& v, const int64_t* last, const Cache& cache, float scale, void* out,
         bool bf16, int threads) {
        bf16 ? attend_next(q, k, v, last, cache, scale, static_cast<uint16_t*>(out), threads)
             : attend_next(q, k, v, last, cache, scale, static_cast<float*>(out), threads);
      },
      [](const Heads& q, const Heads& k, const Heads& v, const int64_t* bounds, int64_t documents, float scale, void* out,
         float* lse, bool bf16, int threads) {
        bf16 ? attend_pack(q, k, v, bounds, documents, scale, static_cast<uint16_t*>(out), lse, threads)
             : attend_pack(q, k, v, bounds, documents, scale, static_cast<float*>(out), lse, threads);
      },
      attend_pack_backward,
      [](const void* gate, const void* up, int64_t stride, int64_t rows, int64_t width, void* out, bool bf16, int threads) {
        bf16 ? swiglu(static_cast<const uint16_t*>(gate), static_cast<const uint16_t*>(up), stride, rows, width,
                      static_cast<uint16_t*>(out), threads)
             : swiglu(static_cast<const float*>(gate), static_cast<const float*>(up), stride, rows, width,
                      static_cast<float*>(out), threads);
      },
      0, nullptr, nullptr,
  };
}

}  // namespace
}  // namespace dasd
