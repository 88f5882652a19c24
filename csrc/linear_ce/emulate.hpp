// AVX-512 without AVX-512: SIMDe's portable definitions of the intrinsics (Debian's libsimde-dev), and the two that its
// release 0.7.4 lacks. For tests on CPUs that have no AVX-512; cmake -DDASD_EMULATE_AVX512=ON. Slow.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <immintrin.h>
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cstring>

#include "core.hpp"

namespace dasd {
namespace {

inline simde__m512i emulated_cvtps_epi32(simde__m512 a) {
  float from[16];
  int32_t to[16];
  std::memcpy(from, &a, sizeof(from));
  for (int i = 0; i < 16; ++i) to[i] = _mm_cvtss_si32(_mm_set_ss(from[i]));
  simde__m512i result;
  std::memcpy(&result, to, sizeof(to));
  return result;
}

inline __m256bh emulated_cvtneps_pbh(simde__m512 a) {
  float from[16];
  uint16_t to[16];
  std::memcpy(from, &a, sizeof(from));
  for (int i = 0; i < 16; ++i) to[i] = to_bf16(from[i]);
  __m256bh result;
  std::memcpy(&result, to, sizeof(to));
  return result;
}

}  // namespace
}  // namespace dasd

#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
