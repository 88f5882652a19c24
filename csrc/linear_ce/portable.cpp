// Any CPU: fp32 operands in four-lane vectors of the compiler's own (SSE2, NEON, ...), a register tile of 4 x 8.
#include "products.hpp"

namespace dasd {
namespace {

struct Portable {
  using Elem = float;
  typedef float V __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  using B = V;
  static constexpr int kStep = 1, kWidth = 4, kRows = 4, kVecs = 2;

  static V load(const float* p) {
    V a;
    std::memcpy(&a, p, sizeof(a));
    return a;
  }
  static void store(float* p, V a) { std::memcpy(p, &a, sizeof(a)); }
  static void store_element(float* p, V a) { store(p, a); }
  static V set(float f) { return V{f, f, f, f}; }
  static V add(V a, V b) { return a + b; }
  static V sub(V a, V b) { return a - b; }
  static V mul(V a, V b) { return a * b; }
  static V div(V a, V b) { return a / b; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V fms(V a, V b, V c) { return a * b - c; }
  static V fnma(V a, V b, V c) { return c - a * b; }
  static V choose(Ints yes, V a, V b) { return (V)((yes & (Ints)a) | (~yes & (Ints)b)); }
  static V max(V a, V b) { return choose(a > b, a, b); }  // b where either is NaN
  static V min(V a, V b) { return choose(a < b, a, b); }
  static V round(V a) { return (a + set(0x1.8p23f)) - set(0x1.8p23f); }  // |a| < 2^22
  static V times_power_of_2(V a, V n) {
    const Ints exponent = __builtin_convertvector(n, Ints) + 127;
    return a * (V)(exponent << 23);
  }
  static V where_less(V a, V b, V yes, V no) { return choose(a < b, yes, no); }
  static V count_greater(V a, V b, V count) { return choose(a > b, count + set(1.f), count); }
  static B load_b(const float* p) { return load(p); }
  static B broadcast(const float* p) { return set(*p); }
  static V multiply_add(B a, B b, V c) { return a * b + c; }
};

bool supported() { return true; }

}  // namespace

extern const Kernels kPortable = table<Portable>("portable", supported);

}  // namespace dasd
