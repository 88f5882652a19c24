// What AVX-512 with fp32 operands and with bf16 operands share: registers of 16 fp32 lanes and their arithmetic.
#pragma once
#ifdef DASD_EMULATE_AVX512
#include "emulate.hpp"
#else
#include <immintrin.h>
#endif

#include "products.hpp"

namespace dasd {
namespace {

#ifdef DASD_EMULATE_AVX512
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

struct Avx512Lanes {
  using V = __m512;
  static constexpr int kWidth = 16, kRows = 8, kVecs = 3;  // 24 accumulators of 32 registers

  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static V set(float f) { return _mm512_set1_ps(f); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V div(V a, V b) { return _mm512_div_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static V fms(V a, V b, V c) { return _mm512_fmsub_ps(a, b, c); }
  static V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
  static V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static V min(V a, V b) { return _mm512_min_ps(a, b); }
  static V round(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static V times_power_of_2(V a, V n) {  // as avx2.cpp's, bit for bit: no subnormals
    const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_mul_ps(a, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
  }
  static V where_less(V a, V b, V yes, V no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static V count_greater(V a, V b, V count) {
    return _mm512_mask_add_ps(count, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), count, _mm512_set1_ps(1.f));
  }
};

}  // namespace
}  // namespace dasd
