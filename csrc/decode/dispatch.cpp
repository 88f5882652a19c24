// The kernels this CPU can run, the widest first.
#include <cstring>

#include "decode.hpp"

namespace dasd {

const DecodeKernels* decode_kernels(const char* name) {
#ifdef DASD_X86
  static const DecodeKernels* const all[] = {&kDecodeAvx512Bf16, &kDecodeAvx512, &kDecodeAvx2, &kDecodePortable};
#else
  static const DecodeKernels* const all[] = {&kDecodePortable};
#endif
  for (const DecodeKernels* k : all)
    if ((*name == 0 || std::strcmp(k->name, name) == 0) && k->supported()) return k;
  return nullptr;
}

}  // namespace dasd
