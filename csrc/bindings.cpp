// The Python module dasd_kernels._C: pointers and sizes in, no torch headers, so that one build serves every torch.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of dasd_kernels; call them through dasd_kernels.";
}
