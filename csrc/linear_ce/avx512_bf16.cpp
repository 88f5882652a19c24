// AVX512-BF16: bf16 operands in pairs, a register tile of 8 x 48 fp32 accumulators. For bf16 inputs, whose weights are
// read as they lie; E and the scaled hidden states are rounded to bf16 for the gradients' products.
#include <cstring>

#include "avx512.hpp"

namespace dasd {
namespace {

struct Avx512Bf16 : Avx512Lanes {
  using Elem = uint16_t;
  using B = __m512bh;
  static constexpr int kStep = 2;

  static void store_element(uint16_t* p, V a) {
    const __m256bh h = _mm512_cvtneps_pbh(a);
    std::memcpy(p, &h, sizeof(h));
  }
  static B load_b(const uint16_t* p) {
    B b;
    std::memcpy(&b, p, sizeof(b));
    return b;
  }
  static B broadcast(const uint16_t* p) {  // a pair
    int32_t pair;
    std::memcpy(&pair, p, 4);
    const __m512i wide = _mm512_set1_epi32(pair);
    B b;
    std::memcpy(&b, &wide, sizeof(b));
    return b;
  }
  static V multiply_add(B a, B b, V c) { return _mm512_dpbf16_ps(c, a, b); }
};

bool supported() {
  return kEmulated || (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16"));
}

}  // namespace

extern const Kernels kAvx512Bf16 = table<Avx512Bf16>("avx512_bf16", supported);

}  // namespace dasd
