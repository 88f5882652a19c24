#define DASD_LANES 16
#include "kernels.hpp"

namespace dasd {
extern const DecodeKernels kDecodeAvx512 = decode_table("avx512", [] { return __builtin_cpu_supports("avx512f") != 0; });
}  // namespace dasd
