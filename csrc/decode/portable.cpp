// Any processor: registers of four, which all of them have or are given by the compiler.
#define DASD_LANES 4
#include "kernels.hpp"

namespace dasd {
extern const DecodeKernels kDecodePortable = decode_table("portable", [] { return true; });
}  // namespace dasd
