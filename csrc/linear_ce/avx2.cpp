// AVX2 + FMA: fp32 operands, a register tile of 6 x 16 (12 accumulators). bf16 and fp16 inputs become fp32 while
// they are packed.
#include <immintrin.h>

#include "products.hpp"

namespace dasd {
namespace {

struct Avx2 {
  using Elem = float;
  using V = __m256;
  using B = __m256;
  static constexpr int kStep = 1, kWidth = 8, kRows = 6, kVecs = 2;

  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static void store_element(float* p, V a) { _mm256_storeu_ps(p, a); }
  static V set(float f) { return _mm256_set1_ps(f); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V div(V a, V b) { return _mm256_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static V fms(V a, V b, V c) { return _mm256_fmsub_ps(a, b, c); }
  static V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static V min(V a, V b) { return _mm256_min_ps(a, b); }
  static V round(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V times_power_of_2(V a, V n) {  // -127 <= n <= 128 whole: 0 for -127, infinity for 128
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static V where_less(V a, V b, V yes, V no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static V count_greater(V a, V b, V count) {
    return _mm256_add_ps(count, _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_set1_ps(1.f)));
  }
  static B load_b(const float* p) { return _mm256_loadu_ps(p); }
  static B broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static V multiply_add(B a, B b, V c) { return _mm256_fmadd_ps(a, b, c); }
};

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace

extern const Kernels kAvx2 = table<Avx2>("avx2", supported);

}  // namespace dasd
