// decode.hpp for Python. Tensors arrive as addresses; kernels/dasd_kernels/decode.py, the one caller, has checked shapes and
// dtypes. The GIL is released while working.
#include "module.hpp"

#include <stdexcept>
#include <string>

#include "decode.hpp"

namespace py = pybind11;

namespace dasd {
namespace {

template <typename T>
T* at(uintptr_t address) { return reinterpret_cast<T*>(address); }

const DecodeKernels& find(const std::string& name) {
  const DecodeKernels* found = decode_kernels(name.c_str());
  if (!found) throw std::invalid_argument("no decode kernels named " + name + " on this CPU");
  return *found;
}

Heads heads(const py::tuple& t) {  // address, stride, rows, count, dim
  return {at<void>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
          t[4].cast<int64_t>()};
}

Cache cache(const py::tuple& t) {  // keys, values, room
  return {at<void>(t[0].cast<uintptr_t>()), at<void>(t[1].cast<uintptr_t>()), t[2].cast<int64_t>()};
}

}  // namespace

void add_decode(py::module_& m) {
  m.def("decode_supports", [](const std::string& name) { return decode_kernels(name.c_str()) != nullptr; });
  m.def("decode_add_rms_norm", [](const std::string& name, uintptr_t x, uintptr_t delta, uintptr_t weight, uintptr_t out,
                                  int64_t rows, int64_t width, float eps, bool bf16, int threads) {
    const DecodeKernels& k = find(name);
    py::gil_scoped_release unlocked;
    k.add_rms_norm({at<void>(x), at<void>(delta), at<void>(weight), at<void>(out), rows, width, eps}, bf16, threads);
  });
  m.def("decode_rotate", [](const std::string& name, const py::tuple& x, uintptr_t cos, uintptr_t sin, uintptr_t norm,
                            float eps, bool bf16, int threads) {
    const DecodeKernels& k = find(name);
    const Heads h = heads(x);
    py::gil_scoped_release unlocked;
    k.rotate(h, {at<float>(cos), at<float>(sin), at<void>(norm), eps}, bf16, threads);
  });
  m.def("decode_append", [](const std::string& name, const py::tuple& keys_, const py::tuple& values_, uintptr_t source,
                            uintptr_t rows, uintptr_t slots, int64_t count, const py::tuple& cache_, bool bf16,
                            int threads) {
    const DecodeKernels& k = find(name);
    const Heads keys = heads(keys_), values = heads(values_);
    const Cache c = cache(cache_);
    py::gil_scoped_release unlocked;
    k.append(keys, values, at<int64_t>(source), at<int64_t>(rows), at<int64_t>(slots), count, c, bf16, threads);
  });
  m.def("decode_attend", [](const std::string& name, const py::tuple& queries, int64_t groups, uintptr_t last,
                            const py::tuple& cache_, float scale, uintptr_t out, bool bf16, int threads) {
    const DecodeKernels& k = find(name);
    const Heads h = heads(queries);
    const Cache c = cache(cache_);
    py::gil_scoped_release unlocked;
    k.attend(h, groups, at<int64_t>(last), c, scale, at<void>(out), bf16, threads);
  });
  m.def("decode_swiglu", [](const std::string& name, uintptr_t gate_up, int64_t rows, int64_t width, uintptr_t out,
                            bool bf16, int threads) {
    const DecodeKernels& k = find(name);
    py::gil_scoped_release unlocked;
    k.swiglu(at<void>(gate_up), rows, width, at<void>(out), bf16, threads);
  });
}

}  // namespace dasd
