// The gradients of attend_pack, fp32: FlashAttention's backward (arXiv 2205.14135), blocks of 96 queries by 48 keys.
//
//   S = Q Kᵀ,  dP = dO Vᵀ,  P = exp(scale S - lse),  dS = scale P (dP - rowsum(dO O))
//   dV += Pᵀ dO,  dK += dSᵀ Q,  dQ += dS K
//
// A task is one document and one head: its result depends neither on its neighbours nor on the threads. Register tiles leave
// out what the mask hides, so of a block on the diagonal about half is computed. FLOPs: 10 a query, key that it sees and
// dimension. Operands are copied first: where heads lie, their rows fill as many pages. Memory a thread: 3 LK for the longest
// document of L tokens; beside it 2 THK where heads share keys.
//
// Measured, two Zen 3 cores with AVX2: 55-70 GFLOP/s a thread (torch.mm 91), 1.2 times as fast as SDPA at 8,192 tokens, twice
// at 500.
#pragma once
#include <cmath>

#include "decode.hpp"
#include "lanes.hpp"
#include "linear_ce/epilogue.hpp"

namespace dasd {
namespace {

constexpr int64_t kBlockQueries = 96, kBlockKeys = 48;
constexpr int64_t kGradientRows = 6, kGradientVecs = Wide::kWidth == 16 ? 4 : 2;  // 24 accumulators of 32 registers, 12 of 16

// C[R, columns of J registers] (+)= A · B. A(i, s) lies at a[i lda + s], or turned at a[s lda + i]; B's rows are ldb apart.
// Not inline, where the caller's variables would take registers from it.
template <bool Turned, int R, int J>
__attribute__((noinline)) void gradient_tile(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                                             float* c, int64_t ldc, bool add) {
  Wide::V acc[R][J];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) acc[i][j] = Wide::set(0.f);
  for (int64_t s = 0; s < depth; ++s) {
    Wide::V row[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) row[j] = Wide::load(b + s * ldb + j * Wide::kWidth);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const float factor = Turned ? a[s * lda + i] : a[i * lda + s];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) acc[i][j] = row[j] * factor + acc[i][j];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {  // a block's sum is made by itself and then added: long documents round less
      float* to = c + i * ldc + j * Wide::kWidth;
      Wide::store(to, add ? Wide::load(to) + acc[i][j] : acc[i][j]);
    }
}

template <bool Turned, int J, int R = kGradientRows>
void gradient_rows(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                   bool add) {
  if (rows >= R) return gradient_tile<Turned, R, J>(a, lda, b, ldb, depth, c, ldc, add);
  if constexpr (R > 1) gradient_rows<Turned, J, R - 1>(rows, a, lda, b, ldb, depth, c, ldc, add);
}

// At most kGradientRows rows, by `columns`, counted in whole registers.
template <bool Turned, int J = kGradientVecs>
void gradient_strip(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t columns, int64_t depth,
                    float* c, int64_t ldc, bool add) {
  int64_t at = 0;
  for (; at + (J - 1) * Wide::kWidth < columns; at += J * Wide::kWidth)
    gradient_rows<Turned, J>(rows, a, lda, b + at, ldb, depth, c + at, ldc, add);
  if constexpr (J > 1)
    if (at < columns) gradient_strip<Turned, J - 1>(rows, a, lda, b + at, ldb, columns - at, depth, c + at, ldc, add);
}

// Rows of `dim` as panels of kBlockKeys of them, [rows / kBlockKeys][dim][kBlockKeys], zero past the last.
inline void turned(const float* x, int64_t stride, int64_t rows, int64_t dim, float* out) {
  for (int64_t r0 = 0; r0 < rows; r0 += kBlockKeys, out += dim * kBlockKeys) {
    const int64_t count = least(kBlockKeys, rows - r0);
    if (count < kBlockKeys) std::memset(out, 0, sizeof(float) * dim * kBlockKeys);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < dim; ++d) out[d * kBlockKeys + r] = x[(r0 + r) * stride + d];
  }
}

inline void copied(const float* x, int64_t stride, int64_t rows, int64_t dim, float* out) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * dim, x + r * stride, sizeof(float) * dim);
}

struct Gradients {  // of one document and head, rows a stride apart
  const float *q, *k, *v, *out, *dout, *lse;
  int64_t q_stride, k_stride, v_stride, out_stride;  // of out, dout and dq: out_stride
  float *dq, *dk, *dv;
  int64_t key_stride;  // of dk and dv
  int64_t length, dim;
  float scale;
};

struct GradientScratch {  // keys and values of a document, and a block of queries
  Buffer<float> turned_keys, turned_values, keys, q, dout, dq, p, ds, delta;
  GradientScratch(int64_t longest, int64_t dim)
      : turned_keys(round_up(longest, kBlockKeys) * dim), turned_values(round_up(longest, kBlockKeys) * dim),
        keys(longest * dim), q(kBlockQueries * dim), dout(kBlockQueries * dim), dq(kBlockQueries * dim), p(kBlockQueries * kBlockKeys),
        ds(kBlockQueries * kBlockKeys), delta(kBlockQueries) {}
};

// One query's scores and dP over a block of keys become P and dS; those after its first `count` keys 0.
inline void gradient_weights(float* p, float* ds, int64_t count, float lse, float delta, float scale) {
  const Wide::V slope = Wide::set(scale);
  int64_t c = 0;
  for (; c < count; c += Wide::kWidth) {
    Wide::V e = exp2<Wide>((Wide::load(p + c) * scale - lse) * kLog2OfE), d = Wide::load(ds + c);
    if (c + Wide::kWidth > count) {
      e = Wide::first(e, count - c);
      d = Wide::first(d, count - c);
    }
    Wide::store(p + c, e);
    Wide::store(ds + c, e * slope * (d - delta));
  }
  for (; c < kBlockKeys; c += Wide::kWidth) {
    Wide::store(p + c, Wide::set(0.f));
    Wide::store(ds + c, Wide::set(0.f));
  }
}

// Queries q0 .. q0 + rows - 1 and keys k0 .. k0 + keys - 1, both blocks whole but for the last.
inline void gradient_block(const Gradients& g, int64_t q0, int64_t rows, int64_t k0, int64_t keys, GradientScratch& x) {
  const int64_t dim = g.dim;
  float *p = x.p.data, *ds = x.ds.data;
  for (int64_t r = 0; r < rows; r += kGradientRows) {
    const int64_t n = least(kGradientRows, rows - r), seen = least(keys, q0 + r + n - k0);
    if (seen <= 0) continue;
    float *pr = p + r * kBlockKeys, *dsr = ds + r * kBlockKeys;
    gradient_strip<false>(n, x.q.data + r * dim, dim, x.turned_keys.data + k0 * dim, kBlockKeys, seen, dim, pr, kBlockKeys,
                          false);
    gradient_strip<false>(n, x.dout.data + r * dim, dim, x.turned_values.data + k0 * dim, kBlockKeys, seen, dim, dsr,
                          kBlockKeys, false);
    for (int64_t i = 0; i < n; ++i)
      gradient_weights(pr + i * kBlockKeys, dsr + i * kBlockKeys, least(keys, q0 + r + i + 1 - k0), g.lse[q0 + r + i],
                       x.delta.data[r + i], g.scale);
    gradient_strip<false>(n, dsr, kBlockKeys, x.keys.data + k0 * dim, dim, dim, seen, x.dq.data + r * dim, dim, k0 > 0);
  }
  for (int64_t r = 0; r < keys; r += kGradientRows) {
    const int64_t n = least(kGradientRows, keys - r), first = k0 + r > q0 ? k0 + r - q0 : 0;
    const int64_t to = (k0 + r) * g.key_stride, from = first * kBlockKeys + r, depth = rows - first;
    gradient_strip<true>(n, p + from, kBlockKeys, x.dout.data + first * dim, dim, dim, depth, g.dv + to, g.key_stride, q0 > k0);
    gradient_strip<true>(n, ds + from, kBlockKeys, x.q.data + first * dim, dim, dim, depth, g.dk + to, g.key_stride, q0 > k0);
  }
}

inline void gradient_task(const Gradients& g, GradientScratch& x) {
  turned(g.k, g.k_stride, g.length, g.dim, x.turned_keys.data);
  turned(g.v, g.v_stride, g.length, g.dim, x.turned_values.data);
  copied(g.k, g.k_stride, g.length, g.dim, x.keys.data);
  for (int64_t q0 = 0; q0 < g.length; q0 += kBlockQueries) {
    const int64_t rows = least(kBlockQueries, g.length - q0);
    copied(g.q + q0 * g.q_stride, g.q_stride, rows, g.dim, x.q.data);
    copied(g.dout + q0 * g.out_stride, g.out_stride, rows, g.dim, x.dout.data);
    for (int64_t r = 0; r < rows; ++r) {
      Wide::V sum = Wide::set(0.f);
      for (int64_t d = 0; d < g.dim; d += Wide::kWidth)
        sum = Wide::load(g.out + (q0 + r) * g.out_stride + d) * Wide::load(x.dout.data + r * g.dim + d) + sum;
      x.delta.data[r] = Wide::total(sum);
    }
    for (int64_t k0 = 0; k0 < q0 + rows; k0 += kBlockKeys) gradient_block(g, q0, rows, k0, least(kBlockKeys, g.length - k0), x);
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(g.dq + (q0 + r) * g.out_stride, x.dq.data + r * g.dim, sizeof(float) * g.dim);
  }
}

// Adds up `partial` [heads, tokens, dim] over the heads of each group: out [tokens, groups, dim].
inline void add_groups(const float* partial, int64_t tokens, int64_t groups, int64_t shared, int64_t dim, float* out,
                       int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < tokens * groups; ++i)
    for (int64_t d = 0; d < dim; d += Wide::kWidth) {
      const float* head = partial + (i % groups * shared * tokens + i / groups) * dim + d;
      Wide::V sum = Wide::load(head);
      for (int64_t h = 1; h < shared; ++h) sum += Wide::load(head + h * tokens * dim);
      Wide::store(out + i * dim + d, sum);
    }
}

inline void attend_pack_backward(const Heads& q, const Heads& k, const Heads& v, const int64_t* bounds, int64_t documents,
                                 float scale, const PackGradients& g, int threads) {
  const int64_t dim = q.dim, groups = k.count, shared = q.count / groups, tokens = bounds[documents];
  int64_t longest = 0;
  for (int64_t i = 0; i < documents; ++i) longest = bounds[i + 1] - bounds[i] > longest ? bounds[i + 1] - bounds[i] : longest;
  const int64_t key_stride = shared > 1 ? dim : groups * dim;
#pragma omp parallel num_threads(threads)
  {
    GradientScratch scratch(longest, dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < documents * q.count; ++task) {
      const int64_t document = g.order[task / q.count], head = task % q.count, group = head / shared, t = bounds[document];
      const int64_t at = (t * q.count + head) * dim, mine = (head * tokens + t) * dim;
      gradient_task({static_cast<const float*>(q.x) + t * q.stride + head * dim,
                     static_cast<const float*>(k.x) + t * k.stride + group * dim,
                     static_cast<const float*>(v.x) + t * v.stride + group * dim, g.out + at, g.dout + at,
                     g.lse + head * tokens + t, q.stride, k.stride, v.stride, q.count * dim, g.dq + at,
                     shared > 1 ? g.partial + mine : g.dk + at,
                     shared > 1 ? g.partial + tokens * q.count * dim + mine : g.dv + at, key_stride,
                     bounds[document + 1] - t, dim, scale},
                    scratch);
    }
  }
  if (shared == 1) return;
  add_groups(g.partial, tokens, groups, shared, dim, g.dk, threads);
  add_groups(g.partial + tokens * q.count * dim, tokens, groups, shared, dim, g.dv, threads);
}

}  // namespace
}  // namespace dasd
