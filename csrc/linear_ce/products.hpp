// The gradients' matrix products (see kernels.hpp), and the table of one instruction set's functions.
#pragma once
#include "kernels.hpp"

namespace dasd {
namespace {

constexpr int64_t kPassRows = 256;  // entries of the vocabulary in one pass of dX: a panel of W by these lies in the L1

template <class I>
int64_t row_stride_of_e(int64_t count) {  // an odd number of cache lines: rows of a block must not share cache sets
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(typename I::Elem));
  return ((count + kLine - 1) / kLine | 1) * kLine;
}

// Tiles of A = E for `rows` tokens from t, over n entries from v: [rows / kRows][n / kStep][kRows][kStep].
template <class I>
void pack_e(const typename I::Elem* e, int64_t lde, int64_t v, int64_t n, int64_t t, int64_t rows, typename I::Elem* out) {
  using Elem = typename I::Elem;
  constexpr int64_t R = I::kRows, S = I::kStep;
  static const Elem zeros[kBlockRows] = {};  // stands for the entry that fills the last step
  const int64_t depth = round_up(n, S);
  for (int64_t k = 0; k < depth; k += S) {
    const Elem* first = e + (v + k) * lde + t;
    const Elem* last = k + S <= n ? first + (S - 1) * lde : zeros;
    for (int64_t r = 0; r < rows; r += R) {
      Elem* to = out + r * depth + k * R;
      if constexpr (S == 2) interleave<R>(first + r, last + r, to);
      else std::memcpy(to, first + r, sizeof(Elem) * R);
    }
  }
}

// dx[c, d] = factor[c] * sum over v of E[c, v] W[v, d]. The output is cut into one piece a thread, by tokens and by columns;
// each piece runs over the whole vocabulary in order, so that the cut leaves no trace in the result.
template <class I>
void hidden_gradient(const Head& h, const Rows& rows, const State& state, int64_t lde, int threads) {
  using Elem = typename I::Elem;
  constexpr int64_t P = kPanel<I>;
  const int64_t panels = round_up(h.width, P) / P, ld = panels * P, registers = round_up(h.width, I::kWidth) / I::kWidth;
  int64_t across = 1;  // pieces side by side; the rest of the threads share the tokens
  for (int64_t n = 1; n <= threads; ++n)
    if (threads % n == 0 && panels / n >= 8) across = n;
  const int64_t down = threads / across, block_count = (rows.count + kBlockRows - 1) / kBlockRows;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t piece = 0; piece < across * down; ++piece) {
    const int64_t d0 = piece % across * registers / across * I::kWidth;
    const int64_t columns = (piece % across + 1) * registers / across * I::kWidth - d0;
    const int64_t c0 = piece / across * block_count / down * kBlockRows;
    const int64_t c1 = least(rows.count, (piece / across + 1) * block_count / down * kBlockRows);
    if (c0 >= c1) continue;
    Buffer<Elem> a(kBlockRows * kPassRows), b(round_up(columns, P) * kPassRows);
    for (int64_t v = 0; v < h.vocab; v += kPassRows) {
      const int64_t n = least(kPassRows, h.vocab - v), depth = round_up(n, I::kStep);
      for (int64_t k = 0; k < depth; k += I::kStep) {
        for (int64_t d = 0; d < columns; d += P) {
          Elem step[I::kStep][P];
          for (int q = 0; q < I::kStep; ++q)
            convert_panel<I>(h.weight, h.dtype, least(v + k + q, h.vocab - 1) * h.row_stride + (d0 + d) * h.col_stride,
                             h.col_stride, k + q < n ? h.width - d0 - d : 0, step[q]);
          pack_step<I>(step, b.data + d * depth + k * P);
        }
      }
      for (int64_t c = c0; c < c1; c += kBlockRows) {
        const int64_t count = least(kBlockRows, c1 - c);
        pack_e<I>(static_cast<const Elem*>(state.e), lde, v, n, c, count, a.data);
        block<I, true>(a.data, I::kRows * depth, count, b.data, P * depth, columns, depth, state.dx + c * ld + d0, ld, v > 0);
      }
    }
    for (int64_t c = c0; c < c1; ++c) {
      float* out = state.dx + c * ld;
      const float factor = state.factor[c], rest = state.hit[c] - state.hit_saved[c];
      if (sizeof(Elem) == 2) {  // what bf16 took from the label's entry
        const int64_t row = rows.labels[c] * h.row_stride;
        for (int64_t d = d0; d < least(d0 + columns, h.width); ++d)
          out[d] += rest * load_float(h.weight, h.dtype, row + d * h.col_stride);
      }
      for (int64_t d = d0; d < d0 + columns; ++d) out[d] *= factor;
    }
  }
}

// factor[c] * x[c, d] as panels over d, for dW.
template <class I>
void pack_scaled(const Rows& rows, int64_t width, const State& state, int threads) {
  constexpr int64_t P = kPanel<I>, S = I::kStep;
  const int64_t depth = round_up(rows.count, S), panels = round_up(width, P) / P;
  auto* xs = static_cast<typename I::Elem*>(state.xs);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < depth; c += S) {
    for (int64_t p = 0; p < panels; ++p) {
      typename I::Elem step[S][P];
      for (int64_t q = 0; q < S; ++q) {
        float values[P] = {};
        if (c + q < rows.count) {
          convert(rows.x, rows.dtype, (c + q) * width + p * P, 1, least(P, width - p * P), values);
          for (int64_t l = 0; l < P; ++l) values[l] *= state.factor[c + q];
        }
        for (int64_t l = 0; l < P; ++l) to_element(values[l], &step[q][l]);
      }
      pack_step<I>(step, xs + p * P * depth + c * P);
    }
  }
}

template <class I>
void forward(const Head& h, const Rows& rows, const Scores& out, const State* state, int threads) {
  using Elem = typename I::Elem;
  const int64_t tokens = round_up(rows.count, kPanel<I>), depth = round_up(h.width, I::kStep);
  const int64_t part = part_rows(h.vocab), parts = (h.vocab + part - 1) / part, lde = row_stride_of_e<I>(rows.count);
  const bool shared = state && state->xs;  // x is done with when xs is made, and no larger
  Buffer<Elem> own(shared ? 0 : tokens * depth);
  Elem* x = shared ? static_cast<Elem*>(state->xs) : own.data;
  Buffer<float> memory(tokens * (4 + parts * 3));
  float* at = memory.data;
  const Lanes lanes{at, at + tokens, at + 2 * tokens, at + 3 * tokens};
  at += 4 * tokens;
  const Partial sums{at, out.entropy ? at + parts * tokens : nullptr, out.rank ? at + 2 * parts * tokens : nullptr};
  Elem* e = state ? static_cast<Elem*>(state->e) : nullptr;
  prepare<I>(h, rows, lanes, x, threads);
  sum_exponentials<I>(h, x, rows.count, tokens, lanes, sums, e, lde, threads);
  if (repair_pivots<I>(h, x, rows.count, tokens, lanes, sums.sum, parts, threads))
    sum_exponentials<I>(h, x, rows.count, tokens, lanes, sums, e, lde, threads);
  finish<I>(h, rows, out, lanes, sums, parts, tokens, state, lde, threads);
  if (!state) return;
  if (state->dx) hidden_gradient<I>(h, rows, *state, lde, threads);
  if (state->xs) pack_scaled<I>(rows, h.width, *state, threads);
}

template <class I>
inline void store_row(const float* row, int64_t columns, const Output& out, int64_t first) {
  int64_t d = 0;
  if (out.dtype == kFloat32) {
    std::memcpy(static_cast<float*>(out.out) + first, row, sizeof(float) * columns);
    return;
  }
  if constexpr (sizeof(typename I::Elem) == 2) {
    auto* to = static_cast<uint16_t*>(out.out) + first;
    for (; out.dtype == kBFloat16 && d + I::kWidth <= columns; d += I::kWidth) I::store_element(to + d, I::load(row + d));
  }
  for (; d < columns; ++d) store_float(out.out, out.dtype, first + d, row[d]);
}

// z[rows, columns] of dW, complete: adds what bf16 took from the labels' entries, then writes rows of the output.
template <class I>
void write_block(const Head& h, const Rows& rows, const State& state, const Output& out, float* z, int64_t ldz, int64_t v,
                 int64_t count, int64_t d0, int64_t columns) {
  constexpr int64_t P = kPanel<I>, S = I::kStep;
  if (sizeof(typename I::Elem) == 2) {
    const auto* xs = static_cast<const typename I::Elem*>(state.xs);
    const int64_t depth = round_up(rows.count, S);
    for (int64_t c = 0; c < rows.count; ++c) {
      if (rows.labels[c] < v || rows.labels[c] >= v + count) continue;
      float* row = z + (rows.labels[c] - v) * ldz;
      const float exact = state.hit[c] * state.factor[c], saved = state.hit_saved[c];
      for (int64_t d = d0; d < d0 + columns; ++d)
        row[d - d0] += exact * load_float(rows.x, rows.dtype, c * h.width + d) -
                       saved * from_element(xs[d / P * P * depth + c / S * S * P + d % P * S + c % S]);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t first = (v + r) * h.width + d0;
    float* row = z + r * ldz;
    if (out.previous)
      for (int64_t d = 0; d < columns; ++d) row[d] += out.previous[first + d];
    if (out.everywhere)
      for (int64_t d = 0; d < columns; ++d) row[d] += out.everywhere[d0 + d];
    if (out.accumulate)
      for (int64_t d = 0; d < columns; ++d) row[d] = load_float(out.out, out.dtype, first + d) + out.scale * row[d];
    else
      for (int64_t d = 0; d < columns; ++d) row[d] *= out.scale;
    store_row<I>(row, columns, out, first);
  }
}

// Blocks end in order, so that no more than one a thread is under way: what makes room for an `out` that lies over E.
template <class I>
void weight_gradient(const Head& h, const Rows& rows, const State& state, const Output& out, int threads) {
  using Elem = typename I::Elem;
  constexpr int64_t P = kPanel<I>;
  const int64_t depth = round_up(rows.count, I::kStep), lde = row_stride_of_e<I>(rows.count);
  const int64_t wide = least(round_up(h.width, P), 256 / P * P), ldz = wide + 16;
  const int64_t passes = depth < kDepth<I> ? 1 : (depth + kDepth<I> / 2) / kDepth<I>;  // about equal: no short one
  const int64_t chain = round_up((depth + passes - 1) / passes, I::kStep);
  const auto* e = static_cast<const Elem*>(state.e);
  const auto* xs = static_cast<const Elem*>(state.xs);
#pragma omp parallel num_threads(threads)
  {
    Buffer<float> z(kBlockRows * ldz);
#pragma omp for ordered schedule(dynamic)
    for (int64_t task = 0; task < (h.vocab + kBlockRows - 1) / kBlockRows; ++task) {
      const int64_t v = task * kBlockRows, count = least(kBlockRows, h.vocab - v);
      for (int64_t d = 0; d < h.width && out.out; d += wide) {
        const int64_t columns = least(wide, h.width - d);
        block<I, false>(e + v * lde, lde, count, xs + d * depth, P * depth, columns, depth, z.data, ldz, false, chain);
        write_block<I>(h, rows, state, out, z.data, ldz, v, count, d, columns);
      }
      for (int64_t r = 0; r < count && out.bias; ++r) {
        double sum = 0;
        for (int64_t c = 0; c < rows.count; ++c)
          sum += state.factor[c] * (rows.labels[c] == v + r ? state.hit[c] : from_element(e[(v + r) * lde + c]));
        out.bias[v + r] += static_cast<float>(out.scale * sum);
      }
#pragma omp ordered
      {}
    }
  }
}

template <class I>
constexpr Kernels table(const char* name, bool (*supported)()) {
  return {name, static_cast<int>(sizeof(typename I::Elem)), kPanel<I>, kBlockRows, supported, forward<I>, weight_gradient<I>};
}

}  // namespace
}  // namespace dasd
