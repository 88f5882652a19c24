// linear_ce.hpp's two calls for an instruction set I: pivoted exponentials, then plain matrix products.
//
// Scores. A row's pivot is the largest of its label's logit and a sample of others (at most 96, V / 64), from the same
// tiles as all logits, so that no running maximum is needed: E = exp2(u - pivot) with fp32's (and bf16's) range of 2^127.
// One sweep over the vocabulary sums E in parts fixed by V alone; where a sum passes 2^40 (a logit 27 nats above the
// pivot) the true maxima are found and the sweep repeated. A row's bits depend on its own data only, never on
// threads. 2NDV FLOPs; memory: the packed hidden states and V / 192 floats a token.
//
// Gradients. The sweep stores Eᵀ [V, C], in bf16 where operands are bf16. With S the row's sum, E's label entry becomes
// E - S (1 - label_smoothing) / (1 + 2 z_loss lse), and everything else is a factor a row: dX = diag(factor) E W,
// dW = Eᵀ diag(factor) X. In bf16, what rounding took from the label's entry (the largest) is added back in fp32. 2NDV FLOPs
// each. dW may be written over E: memory for the larger of the two.
//
// Measured, bf16, two Zen 5 cores, at [1024, 1024, 32768], [2048, 576, 49152], [512, 2560, 151936]: scores take 0.88, 0.86,
// 0.89 of torch.mm's time, with both gradients 0.94, 0.93, 0.88 of three. Registers alone would allow 0.8.
#pragma once
#include <cmath>

#include "epilogue.hpp"

namespace dasd {
namespace {

constexpr int64_t kBlockRows = 96;  // a block of A: these rows by kDepth lie in the L2
constexpr int64_t kSample = 96;
constexpr float kLog2E = 1.44269504088896f;
constexpr double kLn2 = 0.693147180559945309;

inline int64_t part_rows(int64_t vocab) { return vocab >= 8192 ? 8 * kBlockRows : 2 * kBlockRows; }

// Tokens of a block, in whole panels: some 576 at most, and no narrow rest.
template <class I>
int64_t block_tokens(int64_t count) {
  const int64_t panels = round_up(count, kPanel<I>) / kPanel<I>, most = 576 / kPanel<I>, blocks = (panels + most - 1) / most;
  return (panels + blocks - 1) / blocks * kPanel<I>;
}

// Rows of the head as operands: in place where they can be used as they lie, else converted into `scratch`.
template <class I>
const typename I::Elem* head_rows(const Head& h, int64_t v, int64_t rows, typename I::Elem* scratch, int64_t* ld) {
  using Elem = typename I::Elem;
  const bool same = h.dtype == (sizeof(Elem) == 2 ? kBFloat16 : kFloat32);
  if (same && h.col_stride == 1 && h.width % I::kStep == 0) {
    *ld = h.row_stride;
    return static_cast<const Elem*>(h.weight) + v * h.row_stride;
  }
  *ld = round_up(h.width, I::kStep);
  for (int64_t r = 0; r < rows; ++r) {
    scratch[r * *ld + *ld - 1] = 0;
    convert(h.weight, h.dtype, (v + r) * h.row_stride, h.col_stride, h.width, scratch + r * *ld);
  }
  return scratch;
}

template <class I>
void gather_row(const Head& h, int64_t v, typename I::Elem* out) {
  out[round_up(h.width, I::kStep) - 1] = 0;
  convert(h.weight, h.dtype, v * h.row_stride, h.col_stride, h.width, out);
}

template <class I>
void set_targets(const Lanes& lanes, int64_t tokens) {
  for (int64_t t = 0; t < tokens; t += I::kWidth)
    I::store(lanes.target + t, I::fms(I::load(lanes.logit + t), I::load(lanes.scale + t), I::load(lanes.pivot + t)));
}

// Packs the hidden states and finds every row's label logit and pivot.
template <class I>
void prepare(const Head& h, const Rows& rows, const Lanes& lanes, typename I::Elem* x, int threads) {
  using Elem = typename I::Elem;
  constexpr int64_t P = kPanel<I>;
  const int64_t depth = round_up(h.width, I::kStep), panels = round_up(rows.count, P) / P;
  const int64_t sample = least(kSample, h.vocab / 64 + 1);
  Buffer<Elem> sampled(sample * depth);
  Buffer<float> sampled_bias(sample);
  for (int64_t i = 0; i < sample; ++i) {  // half of them the first entries, half spread over the vocabulary
    const int64_t v = i < sample / 2 ? i : i * h.vocab / sample;
    gather_row<I>(h, v, sampled.data + i * depth);
    sampled_bias.data[i] = h.bias ? h.bias[v] : 0.f;
  }
#pragma omp parallel num_threads(threads)
  {
    Buffer<Elem> a(P * depth);
    Buffer<float> z((kSample + P) * P);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t t = p * P, n = least(P, rows.count - t);
      Elem* panel = x + t * depth;
      pack_lanes<I>(rows.x, rows.dtype, h.width, t, n, panel);
      for (int64_t l = 0; l < n; ++l) gather_row<I>(h, rows.labels[t + l], a.data + l * depth);
      block<I, false>(a.data, depth, n, panel, 0, P, depth, z.data, P);
      for (int64_t l = 0; l < P; ++l) {
        lanes.scale[t + l] = l < n ? kLog2E * rows.inverse_temperature[t + l] : 0.f;
        lanes.logit[t + l] = l < n ? z.data[l * P + l] + (h.bias ? h.bias[rows.labels[t + l]] : 0.f) : 0.f;
      }
      typename I::V unused;
      for (int64_t l = 0; l < P; l += I::kWidth) {
        const typename I::V u = cap<I>(I::load(lanes.logit + t + l), 0.f, h.softcap, &unused);
        I::store(lanes.logit + t + l, u);
        I::store(lanes.pivot + t + l, I::max(I::set(-1e30f), I::mul(u, I::load(lanes.scale + t + l))));
      }
      block<I, false>(sampled.data, depth, sample, panel, 0, P, depth, z.data, P);
      maxima<I>(z.data, P, sample, P, t, sampled_bias.data, h.softcap, lanes, lanes.pivot);
      for (int64_t l = n; l < P; ++l) lanes.pivot[t + l] = HUGE_VALF;  // E of the padding is 0
    }
  }
  set_targets<I>(lanes, panels * P);
}

// Every logit once: f(z, ldz, rows, columns, v, t, part) for blocks that cover all parts of the vocabulary and all tokens;
// begin(part, t, columns) before the first block of a part.
template <class I, class Begin, class F>
void sweep(const Head& h, const typename I::Elem* x, int64_t count, int threads, Begin begin, F f) {
  using Elem = typename I::Elem;
  constexpr int64_t P = kPanel<I>;
  const int64_t depth = round_up(h.width, I::kStep), part = part_rows(h.vocab), parts = (h.vocab + part - 1) / part;
  const int64_t tokens = round_up(count, I::kWidth), wide = block_tokens<I>(count);
  const int64_t blocks = (tokens + wide - 1) / wide, ldz = wide + 16;
#pragma omp parallel num_threads(threads)
  {
    Buffer<Elem> a(kBlockRows * depth);
    Buffer<float> z(kBlockRows * ldz);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < parts * blocks; ++task) {
      const int64_t p = task / blocks, t = task % blocks * wide, columns = least(wide, tokens - t);
      begin(p, t, columns);
      for (int64_t v = p * part; v < least(h.vocab, (p + 1) * part); v += kBlockRows) {
        const int64_t rows = least(kBlockRows, least(h.vocab, (p + 1) * part) - v);
        int64_t ld;
        const Elem* w = head_rows<I>(h, v, rows, a.data, &ld);
        block<I, false>(w, ld, rows, x + t * depth, P * depth, columns, depth, z.data, ldz);
        f(z.data, ldz, rows, columns, v, t, p);
      }
    }
  }
}

// The sums of all rows, [parts, tokens] each, and E where a State is given.
template <class I>
void sum_exponentials(const Head& h, const typename I::Elem* x, int64_t count, int64_t tokens, const Lanes& lanes,
                      const Partial& all, typename I::Elem* e, int64_t lde, int threads) {
  const bool plain = !h.bias && h.softcap == 0.f && !all.weighted && !all.above;
  const auto at = [&](int64_t p) {
    return Partial{all.sum + p * tokens, all.weighted ? all.weighted + p * tokens : nullptr,
                   all.above ? all.above + p * tokens : nullptr};
  };
  sweep<I>(
      h, x, count, threads,
      [&](int64_t p, int64_t t, int64_t columns) {
        const Partial out = at(p);
        float* const each[] = {out.sum, out.weighted, out.above};
        for (float* sums : each)
          if (sums) std::memset(sums + t, 0, sizeof(float) * columns);
      },
      [&](const float* z, int64_t ldz, int64_t rows, int64_t columns, int64_t v, int64_t t, int64_t p) {
        if (plain) exponentials<I, true>(z, ldz, rows, columns, v, t, nullptr, 0.f, lanes, at(p), e, lde);
        else exponentials<I, false>(z, ldz, rows, columns, v, t, h.bias, h.softcap, lanes, at(p), e, lde);
      });
}

// Rows whose sum left the safe range get their true maximum as pivot. False where there were none.
template <class I>
bool repair_pivots(const Head& h, const typename I::Elem* x, int64_t count, int64_t tokens, const Lanes& lanes,
                   const float* sums, int64_t parts, int threads) {
  Buffer<bool> bad(count);
  bool any = false;
  for (int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (int64_t p = 0; p < parts; ++p) total += sums[p * tokens + i];
    any |= bad.data[i] = total > 0x1p40;
  }
  if (!any) return false;
  Buffer<float> top(parts * tokens);
  sweep<I>(
      h, x, count, threads,
      [&](int64_t p, int64_t t, int64_t columns) {
        for (int64_t c = 0; c < columns; ++c) top.data[p * tokens + t + c] = -HUGE_VALF;
      },
      [&](const float* z, int64_t ldz, int64_t rows, int64_t columns, int64_t v, int64_t t, int64_t p) {
        maxima<I>(z, ldz, rows, columns, t, h.bias ? h.bias + v : nullptr, h.softcap, lanes, top.data + p * tokens);
      });
  for (int64_t i = 0; i < count; ++i) {
    if (!bad.data[i]) continue;
    float largest = top.data[i];
    for (int64_t p = 1; p < parts; ++p) largest = top.data[p * tokens + i] > largest ? top.data[p * tokens + i] : largest;
    lanes.pivot[i] = largest;
  }
  set_targets<I>(lanes, tokens);
  return true;
}

// Sums -> scores, and what turns E into the gradient.
template <class I>
void finish(const Head& h, const Rows& rows, const Scores& out, const Lanes& lanes, const Partial& sums, int64_t parts,
            int64_t tokens, const State* state, int64_t lde, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows.count; ++i) {
    double s = 0, weighted = 0, above = 0;
    for (int64_t p = 0; p < parts; ++p) {
      s += sums.sum[p * tokens + i];
      if (sums.weighted) weighted += sums.weighted[p * tokens + i];
      if (sums.above) above += sums.above[p * tokens + i];
    }
    const double inverse = rows.inverse_temperature[i], x = lanes.target[i], bits = ::log2(s);
    const double lse = lanes.logit[i] * inverse + kLn2 * (bits - x);
    out.nll[i] = static_cast<float>(kLn2 * (bits - x));
    out.lse[i] = static_cast<float>(lse);
    if (out.entropy) out.entropy[i] = static_cast<float>(kLn2 * (bits - weighted / s));
    if (out.rank) out.rank[i] = static_cast<int64_t>(above);
    if (!state) continue;
    double k = 1 + 2 * rows.z_loss * lse;
    if (k < 1e-6 && k > -1e-6) k = k < 0 ? -1e-6 : 1e-6;  // the loss's slope in lse vanishes: S / k must not overflow
    const double t = h.softcap == 0.f ? 0. : lanes.logit[i] / h.softcap;
    state->factor[i] = static_cast<float>(rows.coefficient[i] * k * inverse / s);
    state->hit[i] = static_cast<float>((1 - t * t) * (::exp2(x) - (1 - rows.label_smoothing) * s / k));
    auto* entry = static_cast<typename I::Elem*>(state->e) + rows.labels[i] * lde + i;
    to_element(state->hit[i], entry);
    state->hit_saved[i] = from_element(*entry);
  }
}

}  // namespace
}  // namespace dasd

#include "products.hpp"
