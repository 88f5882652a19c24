// Loops that the compiler makes vectors of, a copy for each instruction set, chosen when the module is loaded.
#include "pointwise.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && !defined(__clang__) && __GNUC__ >= 12
#define DASD_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define DASD_CLONES
#endif
#define DASD_INLINE inline __attribute__((always_inline))

namespace dasd::pointwise {
namespace {

using bf16 = uint16_t;

DASD_INLINE float wide(float f) { return f; }
DASD_INLINE uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
DASD_INLINE float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
DASD_INLINE uint32_t round_to_bf16(float f) {  // to nearest even, in the upper half; a NaN stays one
  const uint32_t bits = bits_of(f), even = bits + 0x7fffu + ((bits >> 16) & 1);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : even;
}
DASD_INLINE void narrow(float f, float* out) { *out = f; }
DASD_INLINE void narrow(float f, bf16* out) { *out = static_cast<bf16>(round_to_bf16(f) >> 16); }
DASD_INLINE float wide(bf16 h) { return float_of(static_cast<uint32_t>(h) << 16); }
template <class T>
DASD_INLINE float rounded(float f) {
  return sizeof(T) == 4 ? f : float_of(round_to_bf16(f) & 0xffff0000u);
}

DASD_INLINE float sigmoid(float x) {  // to 3e-7; 2^f as in linear_ce/epilogue.hpp
  float u = x * -1.44269504f;
  u = u < -126.f ? -126.f : u;
  u = u > 126.f ? 126.f : u;
  const float n = (u + 0x1.8p23f) - 0x1.8p23f, f = u - n;
  float p = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.f;
  return 1.f / (1.f + p * float_of(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23));
}

constexpr int64_t kSums = 16;  // independent sums, so that they can be lanes

// dx = rstd (w dy - x rstd² mean(w dy x)), dweight += dy x rstd
template <class T>
DASD_INLINE void norm_rows_backward(const Norm& norm, const float* rstd, const void* dy_, void* dx_, float* dweight,
                                    int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(norm.weight);
  for (int64_t r = begin; r < end; ++r) {
    const T *x = static_cast<const T*>(norm.x) + r * norm.width, *dy = static_cast<const T*>(dy_) + r * norm.width;
    T* dx = static_cast<T*>(dx_) + r * norm.width;
    const float factor = rstd[r];
    float sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= norm.width; i += kSums)
      for (int64_t l = 0; l < kSums; ++l) sums[l] += wide(x[i + l]) * wide(dy[i + l]) * wide(weight[i + l]);
    for (int64_t l = 0; i + l < norm.width; ++l) sums[l] += wide(x[i + l]) * wide(dy[i + l]) * wide(weight[i + l]);
    float total = 0.f;
    for (float sum : sums) total += sum;
    const float along = total * factor * factor / static_cast<float>(norm.width);
    for (i = 0; i < norm.width; ++i) {
      dweight[i] += wide(dy[i]) * wide(x[i]) * factor;
      narrow(factor * (wide(dy[i]) * wide(weight[i]) - wide(x[i]) * along), dx + i);
    }
  }
}

template <class T>
DASD_INLINE void swiglu_block_backward(const void* gate_, const void* up_, const void* dy_, void* dgate_, void* dup_,
                                       int64_t begin, int64_t end) {
  const T *gate = static_cast<const T*>(gate_), *up = static_cast<const T*>(up_), *dy = static_cast<const T*>(dy_);
  T *dgate = static_cast<T*>(dgate_), *dup = static_cast<T*>(dup_);
  for (int64_t i = begin; i < end; ++i) {
    const float g = wide(gate[i]), s = sigmoid(g), d = wide(dy[i]);
    narrow(d * rounded<T>(g * s), dup + i);
    narrow(d * wide(up[i]) * s * (1.f + g * (1.f - s)), dgate + i);
  }
}

DASD_INLINE double squared(float x) { return static_cast<double>(x) * static_cast<double>(x); }

template <class T>
DASD_INLINE double squares(const T* x, int64_t count) {
  double sums[kSums] = {}, total = 0.;
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (int64_t l = 0; l < kSums; ++l) sums[l] += squared(wide(x[i + l]));
  for (; i < count; ++i) total += squared(wide(x[i]));
  for (double sum : sums) total += sum;
  return total;
}

// Moments in three bytes. The first is held as its ratio to the root of the second, which Adam's bounds keep below 30
// (kernels/dasd_kernels/adamw.py), in a sign and seven bits: the bits of |ratio| + kLeast past those of kLeast, so 3 of
// mantissa and no gap at zero. The second is bf16. Rounding is stochastic, or decay would stop where it is less than half
// a step.
constexpr float kLeast = 0x1p-11f;
constexpr uint32_t kLeastBits = (127u - 11u) << 23;

DASD_INLINE uint32_t random_bits(uint32_t place, uint32_t seed) {  // murmur3's last lines
  uint32_t h = (place * 0x9e3779b1u) ^ seed;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}
DASD_INLINE float ratio_of(int8_t code) {
  const uint32_t magnitude = static_cast<uint32_t>(code < 0 ? -code : code);
  const float ratio = float_of(kLeastBits + (magnitude << 20)) - kLeast;
  return code < 0 ? -ratio : ratio;
}
DASD_INLINE int8_t code_of(float ratio, uint32_t random20) {
  const uint32_t code = (bits_of(std::fabs(ratio) + kLeast) - kLeastBits + random20) >> 20;
  const int32_t magnitude = static_cast<int32_t>(code < 127u ? code : 127u);
  return static_cast<int8_t>(ratio < 0.f ? -magnitude : magnitude);
}

// W: float, or bf16 beside low bits. M: float, or int8_t beside a second moment in bf16. G: the gradients.
template <class W, class M, class G>
DASD_INLINE void adamw_block(const Weights& x, const void* grad_, const AdamW o, int64_t begin, int64_t end) {
  constexpr bool compact = sizeof(M) == 1;
  using Second = std::conditional_t<compact, bf16, float>;
  const G* __restrict grad = static_cast<const G*>(grad_);
  W* __restrict weights = static_cast<W*>(x.weight);
  uint16_t* __restrict low = x.low;
  M* __restrict first = static_cast<M*>(x.first);
  Second* __restrict second = static_cast<Second*>(x.second);
  for (int64_t i = begin; i < end; ++i) {
    const float g = wide(grad[i]) * o.scale, was = wide(second[i]);
    float m, weight;
    if constexpr (compact) m = ratio_of(first[i]) * std::sqrt(was);
    else m = first[i];
    if constexpr (sizeof(W) == 4) {
      weight = weights[i];
    } else {
      const uint32_t below = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(low[i])));
      weight = float_of((static_cast<uint32_t>(weights[i]) << 16) + below);
    }
    m += (g - m) * (1.f - o.beta1);
    const float v = was * o.beta2 + g * g * (1.f - o.beta2);
    const uint32_t bits = bits_of(weight * o.decay - o.rate * m / (std::sqrt(v) * o.root + o.eps));
    if constexpr (compact) {
      const uint32_t random = random_bits(static_cast<uint32_t>(i) + o.place, o.seed);
      second[i] = static_cast<bf16>((bits_of(v) + (random & 0xffffu)) >> 16);
      const float root = std::sqrt(wide(second[i]));
      first[i] = code_of(root > 0.f ? m / root : 0.f, random >> 12);
    } else {
      first[i] = m;
      second[i] = v;
    }
    if constexpr (sizeof(W) == 4) {
      weights[i] = float_of(bits);
    } else {
      weights[i] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
      low[i] = static_cast<uint16_t>(bits);
    }
  }
}

template <class W, class M>
DASD_INLINE void adamw_block(const Weights& x, const void* grad, const AdamW& o, int64_t begin, int64_t end, bool half) {
  if (half) adamw_block<W, M, bf16>(x, grad, o, begin, end);
  else adamw_block<W, M, float>(x, grad, o, begin, end);
}

// The entries below are what is compiled once an instruction set; everything above is inlined into them.
DASD_CLONES void norm_part_backward(const Norm& n, const float* rstd, const void* dy, void* dx, float* dweight,
                                    int64_t begin, int64_t end) {
  if (n.bf16) norm_rows_backward<bf16>(n, rstd, dy, dx, dweight, begin, end);
  else norm_rows_backward<float>(n, rstd, dy, dx, dweight, begin, end);
}

DASD_CLONES void swiglu_part_backward(const void* gate, const void* up, const void* dy, void* dgate, void* dup,
                                      int64_t begin, int64_t end, bool half) {
  if (half) swiglu_block_backward<bf16>(gate, up, dy, dgate, dup, begin, end);
  else swiglu_block_backward<float>(gate, up, dy, dgate, dup, begin, end);
}

DASD_CLONES double squares_part(const void* x, int64_t begin, int64_t end, bool half) {
  return half ? squares(static_cast<const bf16*>(x) + begin, end - begin)
              : squares(static_cast<const float*>(x) + begin, end - begin);
}

DASD_CLONES void adamw_part(const Weights& x, const void* grad, const AdamW& o, int64_t begin, int64_t end, bool half) {
  if (x.low && x.compact) adamw_block<bf16, int8_t>(x, grad, o, begin, end, half);
  else if (x.low) adamw_block<bf16, float>(x, grad, o, begin, end, half);
  else if (x.compact) adamw_block<float, int8_t>(x, grad, o, begin, end, half);
  else adamw_block<float, float>(x, grad, o, begin, end, half);
}

constexpr int64_t kBlock = 1 << 14;  // elements a thread takes at a time

template <class Body>
void in_blocks(int64_t count, int threads, Body body) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static) if (blocks > 1)
  for (int64_t b = 0; b < blocks; ++b) body(b * kBlock, std::min(count, (b + 1) * kBlock));
}

}  // namespace

void rms_norm_backward(const Norm& norm, const float* rstd, const void* dy, void* dx, void* dweight, float* partial,
                       int threads) {
  std::memset(partial, 0, sizeof(float) * kNormParts * static_cast<size_t>(norm.width));
#pragma omp parallel for num_threads(threads) schedule(static) if (norm.rows * norm.width > kBlock)
  for (int64_t p = 0; p < kNormParts; ++p)
    norm_part_backward(norm, rstd, dy, dx, partial + p * norm.width, norm.rows * p / kNormParts,
                       norm.rows * (p + 1) / kNormParts);
  for (int64_t i = 0; i < norm.width; ++i) {
    float sum = 0.f;
    for (int64_t p = 0; p < kNormParts; ++p) sum += partial[p * norm.width + i];
    if (norm.bf16) narrow(sum, static_cast<bf16*>(dweight) + i);
    else static_cast<float*>(dweight)[i] = sum;
  }
}

void swiglu_backward(const void* gate, const void* up, const void* dy, void* dgate, void* dup, int64_t count, bool half,
                     int threads) {
  in_blocks(count, threads, [=](int64_t begin, int64_t end) {
    swiglu_part_backward(gate, up, dy, dgate, dup, begin, end, half);
  });
}

double sum_of_squares(const void* x, int64_t count, bool half, int threads) {
  std::vector<double> sums(static_cast<size_t>((count + kBlock - 1) / kBlock));
  in_blocks(count, threads, [&](int64_t begin, int64_t end) {
    sums[static_cast<size_t>(begin / kBlock)] = squares_part(x, begin, end, half);
  });
  double total = 0.;
  for (double sum : sums) total += sum;
  return total;
}

void adamw(const Weights& weights, const void* grad, const AdamW& options, int64_t count, bool half, int threads) {
  in_blocks(count, threads,
            [&](int64_t begin, int64_t end) { adamw_part(weights, grad, options, begin, end, half); });
}

}  // namespace dasd::pointwise
