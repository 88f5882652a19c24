// The Python module dasd_kernels._cuda: launches on addresses that dasd_kernels.packing has checked. A module of its
// own, imported when a CUDA device is first used: dasd_kernels._C needs no CUDA, and this one carries its runtime.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda.hpp"

namespace py = pybind11;

namespace {

void check(const char* error) {
  if (error) throw std::runtime_error("CUDA: " + std::string(error));
}

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

void write_packs(int device, uintptr_t stage, int64_t packs, int64_t capacity, uintptr_t stream) {
  check(dasd::launch_packs(device, at(stage), packs, capacity, at(stream)));
}

void gather_rows(int device, uintptr_t from, uintptr_t valid, int64_t count, int64_t bytes, uintptr_t to,
                 uintptr_t stream) {
  check(dasd::launch_gather(device, at(from), static_cast<const int64_t*>(at(valid)), count, bytes, at(to), at(stream)));
}

void scatter_rows(int device, uintptr_t from, uintptr_t valid, int64_t count, int64_t rows, int64_t bytes,
                  uintptr_t to, uintptr_t stream) {
  check(dasd::launch_scatter(device, at(from), static_cast<const int64_t*>(at(valid)), count, rows, bytes, at(to),
                             at(stream)));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of dasd_kernels; call them through dasd_kernels.packing.";
  m.def("write_packs", &write_packs);
  m.def("gather_rows", &gather_rows);
  m.def("scatter_rows", &scatter_rows);
}
