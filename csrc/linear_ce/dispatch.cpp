// The kernels this CPU can run, by name.
#include <cstring>

#include "linear_ce.hpp"

namespace dasd {

const Kernels* kernels(const char* name) {
#ifdef DASD_X86
  static const Kernels* const all[] = {&kAvx512Bf16, &kAvx512, &kAvx2, &kPortable};
#else
  static const Kernels* const all[] = {&kPortable};
#endif
  for (const Kernels* k : all)
    if (std::strcmp(k->name, name) == 0 && k->supported()) return k;
  return nullptr;
}

}  // namespace dasd
