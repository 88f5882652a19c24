// AVX-512F: fp32 operands, a register tile of 8 x 48. For fp32 and fp16 inputs, and bf16 ones without AVX512-BF16.
#include "avx512.hpp"

namespace dasd {
namespace {

struct Avx512 : Avx512Lanes {
  using Elem = float;
  using B = __m512;
  static constexpr int kStep = 1;

  static void store_element(float* p, V a) { _mm512_storeu_ps(p, a); }
  static B load_b(const float* p) { return _mm512_loadu_ps(p); }
  static B broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static V multiply_add(B a, B b, V c) { return _mm512_fmadd_ps(a, b, c); }
};

bool supported() { return kEmulated || __builtin_cpu_supports("avx512f"); }

}  // namespace

extern const Kernels kAvx512 = table<Avx512>("avx512", supported);

}  // namespace dasd
