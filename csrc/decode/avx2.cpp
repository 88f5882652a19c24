#define DASD_LANES 8
#include "kernels.hpp"

namespace dasd {
extern const DecodeKernels kDecodeAvx2 =
    decode_table("avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); });
}  // namespace dasd
