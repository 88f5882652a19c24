// Registers of DASD_LANES fp32 numbers by the compilers' vector extension: one source for every instruction set.
#pragma once
#include <cstdint>
#include <cstring>

namespace dasd {
namespace {

constexpr float kLog2OfE = 1.44269504088896f;

struct Wide {
  static constexpr int64_t kWidth = DASD_LANES;
  typedef float V __attribute__((vector_size(4 * DASD_LANES)));
  typedef uint32_t Bits __attribute__((vector_size(4 * DASD_LANES)));
  typedef int32_t Whole __attribute__((vector_size(4 * DASD_LANES)));
  typedef uint16_t Halves __attribute__((vector_size(2 * DASD_LANES)));

  static V set(float f) { return V{} + f; }
  static V sub(V a, V b) { return a - b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V max(V a, V b) { return a > b ? a : b; }  // b where either is NaN
  static V min(V a, V b) { return a < b ? a : b; }
  static V round(V a) { return a + set(12582912.f) - set(12582912.f); }  // 1.5 * 2^23: for |a| < 2^22
  static V times_power_of_2(V a, V n) {  // -127 <= n <= 128 whole: 0 for -127, infinity for 128
    const Whole exponent = (__builtin_convertvector(n, Whole) + 127) << 23;
    V power;
    std::memcpy(&power, &exponent, sizeof(power));
    return a * power;
  }

  static V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static V load(const uint16_t* p) {  // bf16
    Halves h;
    std::memcpy(&h, p, sizeof(h));
    const Bits bits = __builtin_convertvector(h, Bits) << 16;
    V v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, &v, sizeof(v)); }
  static void store(uint16_t* p, V v) {  // to nearest even; a NaN stays one
    Bits bits;
    std::memcpy(&bits, &v, sizeof(bits));
    bits = v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
    const Halves h = __builtin_convertvector(bits >> 16, Halves);
    std::memcpy(p, &h, sizeof(h));
  }

  // The first n lanes only, the others 0.
  template <class E>
  static V load(const E* p, int64_t n) {
    if (n >= kWidth) return load(p);
    E some[kWidth] = {};
    for (int64_t i = 0; i < n; ++i) some[i] = p[i];
    return load(some);
  }
  template <class E>
  static void store(E* p, V v, int64_t n) {
    if (n >= kWidth) return store(p, v);
    E some[kWidth];
    store(some, v);
    for (int64_t i = 0; i < n; ++i) p[i] = some[i];
  }
  static V first(V v, int64_t n) {  // the first n lanes, the others 0
    Whole lane{};
    for (int i = 0; i < kWidth; ++i) lane[i] = i;
    return lane < static_cast<int32_t>(n) ? v : V{};
  }
  template <class E>
  static V rounded(V v) {  // to E's precision
    E some[kWidth];
    store(some, v);
    return load(some);
  }

  static float total(V v) {
    float f[kWidth];
    store(f, v);
    for (int64_t half = kWidth / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half; ++i) f[i] += f[i + half];
    return f[0];
  }
  static float largest(V v) {
    float f[kWidth];
    store(f, v);
    for (int64_t i = 1; i < kWidth; ++i) f[0] = f[i] > f[0] ? f[i] : f[0];
    return f[0];
  }
};

}  // namespace
}  // namespace dasd
