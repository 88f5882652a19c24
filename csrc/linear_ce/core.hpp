// The matrix product under everything here: Z[rows, panels] = A · B in fp32 accumulators, written against the vector
// traits I of an instruction set, so that the path tested on one machine is the arithmetic of all of them.
//
//   I::Elem, I::kStep     operands: float, 1 element a multiply-add; or bf16 (uint16_t), 2
//   I::V, I::kWidth       a register of fp32 and its lanes;  I::kRows x I::kVecs: the register tile
//   A   rows of k contiguous elements (a head's own rows, or E's), or tiles [k / kStep][kRows][kStep]
//   B   panels of kPanel = kVecs * kWidth lanes, [k / kStep][kPanel][kStep]; of the last one only the registers in use
//
// An element of Z is a sum, in order, of chains of kDepth multiply-adds (shorter chains round less), whatever its place in
// a tile and whatever else is computed: results depend on a row's and a column's own data only.
//
// Everything is inline in an unnamed namespace or a template over I: code compiled for one instruction set must never
// be shared with another (so no std:: templates either).
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "linear_ce.hpp"

namespace dasd {
namespace {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline float from_bf16(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_bf16(float f) {  // to nearest even; a NaN stays one
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float from_fp16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu, sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t bits = magnitude << 13;
  float f;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    bits += (255u - 31u) << 23;
  } else if (magnitude >= 0x0400u) {
    bits += (127u - 15u) << 23;
  } else {  // subnormal: a small integer times 2^-24
    f = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
  }
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t to_fp16(float f) {  // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65520 or more
  if (bits < 0x38800000u) {                        // subnormal: the adder rounds at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits -= (127u - 15u) << 23;
  return sign | static_cast<uint16_t>((bits + 0xfffu + ((bits >> 13) & 1)) >> 13);
}

inline float load_float(const void* p, Dtype dtype, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == kBFloat16 ? from_bf16(h) : from_fp16(h);
}

inline void store_float(void* p, Dtype dtype, int64_t i, float f) {
  if (dtype == kFloat32) static_cast<float*>(p)[i] = f;
  else static_cast<uint16_t*>(p)[i] = dtype == kBFloat16 ? to_bf16(f) : to_fp16(f);
}

inline void to_element(float f, float* out) { *out = f; }
inline void to_element(float f, uint16_t* out) { *out = to_bf16(f); }
inline float from_element(float f) { return f; }
inline float from_element(uint16_t h) { return from_bf16(h); }

// n elements at `p`, `stride` apart, as the operands' type.
template <class Elem>
__attribute__((always_inline)) inline void convert(const void* p, Dtype dtype, int64_t first, int64_t stride, int64_t n, Elem* out) {
  if (stride == 1 && dtype == kFloat32) {
    const float* source = static_cast<const float*>(p) + first;
    for (int64_t i = 0; i < n; ++i) to_element(source[i], out + i);
  } else if (stride == 1 && dtype == kBFloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(p) + first;
    if (sizeof(Elem) == 2) std::memcpy(out, source, 2 * n);
    else for (int64_t i = 0; i < n; ++i) to_element(from_bf16(source[i]), out + i);
  } else {
    for (int64_t i = 0; i < n; ++i) to_element(load_float(p, dtype, first + i * stride), out + i);
  }
}

// Memory of one call or thread, on cache lines, not cleared.
template <class T>
struct Buffer {
  T* data;
  explicit Buffer(int64_t n)
      : data(static_cast<T*>(std::aligned_alloc(64, round_up(static_cast<int64_t>(sizeof(T)) * (n + 16), 64)))) {
    if (!data) std::abort();  // inside a parallel region nothing better is left to do
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <class I>
constexpr int64_t kPanel = I::kWidth * I::kVecs;
template <class I>
constexpr int64_t kDepth = 1024 / static_cast<int64_t>(sizeof(typename I::Elem));  // k of a pass: a panel fits the L1

template <class I, int R, bool Packed, int Vecs>
void tile(const typename I::Elem* a, int64_t lda, const typename I::Elem* b, int64_t steps, float* c, int64_t ldc,
          bool add) {
  typename I::V acc[R][Vecs];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) acc[i][j] = I::set(0.f);
  for (int64_t s = 0; s < steps; ++s) {
    typename I::B bv[Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) bv[j] = I::load_b(b + (s * kPanel<I> + j * I::kWidth) * I::kStep);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const typename I::B av = I::broadcast(Packed ? a + (s * I::kRows + i) * I::kStep : a + i * lda + s * I::kStep);
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) acc[i][j] = I::multiply_add(av, bv[j], acc[i][j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) {
      float* to = c + i * ldc + j * I::kWidth;
      I::store(to, add ? I::add(I::load(to), acc[i][j]) : acc[i][j]);
    }
}

template <class I, bool Packed, int Vecs, int R = I::kRows>
inline void tile_rows(int64_t rows, const typename I::Elem* a, int64_t lda, const typename I::Elem* b, int64_t steps,
                      float* c, int64_t ldc, bool add) {
  if (rows >= R) return tile<I, R, Packed, Vecs>(a, lda, b, steps, c, ldc, add);
  if constexpr (R > 1) tile_rows<I, Packed, Vecs, R - 1>(rows, a, lda, b, steps, c, ldc, add);
}

// `vecs` registers of one panel, for all rows.
template <class I, bool Packed, int Vecs = I::kVecs>
inline void strip(int64_t vecs, const typename I::Elem* a, int64_t lda, int64_t rows, const typename I::Elem* b,
                  int64_t steps, float* z, int64_t ldz, bool add) {
  if (vecs >= Vecs) {
    for (int64_t r = 0; r < rows; r += I::kRows)
      tile_rows<I, Packed, Vecs>(rows - r, a + (Packed ? r / I::kRows : r) * lda, lda, b, steps, z + r * ldz, ldz, add);
  } else if constexpr (Vecs > 1) {
    strip<I, Packed, Vecs - 1>(vecs, a, lda, rows, b, steps, z, ldz, add);
  }
}

// z[rows, columns] (+)= A · B over k, which is a multiple of kStep; columns count in whole registers. Packed tiles of A are
// `lda` elements apart.
template <class I, bool Packed>
void block(const typename I::Elem* a, int64_t lda, int64_t rows, const typename I::Elem* b, int64_t panel_stride,
           int64_t columns, int64_t k, float* z, int64_t ldz, bool add = false, int64_t chain = kDepth<I>) {
  for (int64_t k0 = 0; k0 < k; k0 += chain) {
    const int64_t steps = least(chain, k - k0) / I::kStep;
    for (int64_t c = 0; c < columns; c += kPanel<I>)
      strip<I, Packed>((columns - c + I::kWidth - 1) / I::kWidth, a + k0 * (Packed ? I::kRows : 1), lda, rows,
                       b + c / kPanel<I> * panel_stride + k0 * kPanel<I>, steps, z + c, ldz, add || k0 > 0);
  }
}

// One panel whose lanes are rows: lane l, depth k from x[l][k], times scale[l]. Lanes from `lanes` on are zero, and so is
// the k that fills the last step.
template <class I>
void pack_lanes(const void* x, Dtype dtype, int64_t width, int64_t first, int64_t lanes, typename I::Elem* out) {
  constexpr int64_t kBlock = 64;
  typename I::Elem row[kBlock + 2] = {};
  const int64_t depth = round_up(width, I::kStep);
  if (lanes < kPanel<I>) std::memset(out, 0, sizeof(typename I::Elem) * depth * kPanel<I>);
  for (int64_t k0 = 0; k0 < depth; k0 += kBlock) {
    const int64_t n = least(kBlock, width - k0);
    if (n < kBlock) std::memset(row, 0, sizeof(row));
    for (int64_t l = 0; l < lanes; ++l) {
      convert(x, dtype, (first + l) * width + k0, 1, n, row);
      for (int64_t k = 0; k < round_up(n, I::kStep); k += I::kStep)
        for (int64_t q = 0; q < I::kStep; ++q) out[(k0 + k) * kPanel<I> + l * I::kStep + q] = row[k + q];
    }
  }
}

// kPanel converted elements from `first` on, the ones past `count` zero: a panel's depth step of kStep such rows.
template <class I>
inline void convert_panel(const void* p, Dtype dtype, int64_t first, int64_t stride, int64_t count, typename I::Elem* out) {
  if (count >= kPanel<I> && stride == 1) return convert(p, dtype, first, 1, kPanel<I>, out);
  convert(p, dtype, first, stride, least(count, kPanel<I>), out);
  for (int64_t l = count < 0 ? 0 : count; l < kPanel<I>; ++l) out[l] = 0;
}

// out[i] = (a[i], b[i]) as neighbours: a step of two elements. A fixed length, so that compilers make registers of it.
template <int64_t N>
inline void interleave(const uint16_t* a, const uint16_t* b, uint16_t* out) {
  uint32_t pairs[N];
  for (int64_t i = 0; i < N; ++i) pairs[i] = a[i] | static_cast<uint32_t>(b[i]) << 16;
  std::memcpy(out, pairs, sizeof(pairs));
}

template <class I>
inline void pack_step(const typename I::Elem (*rows)[kPanel<I>], typename I::Elem* out) {
  if constexpr (I::kStep == 2) interleave<kPanel<I>>(rows[0], rows[1], out);
  else std::memcpy(out, rows[0], sizeof(rows[0]));
}

}  // namespace
}  // namespace dasd
