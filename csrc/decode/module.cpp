// decode.hpp for Python. Tensors arrive as addresses; kernels/dasd_kernels/decode.py, the one caller, has checked shapes and
// dtypes. The GIL is released while working.
#include "module.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

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
    k.add_rms_norm({at<void>(x), at<void>(delta), at<void>(weight), at<void>(out), nullptr, rows, width, eps}, bf16, threads);
  });
  m.def("decode_rotate", [](const std::string& name, const py::tuple& x, uintptr_t cos, uintptr_t sin, uintptr_t norm,
                            float eps, bool bf16, int threads) {
    const DecodeKernels& k = find(name);
    const Heads h = heads(x);
    py::gil_scoped_release unlocked;
    k.rotate(h, {at<float>(cos), at<float>(sin), 1.f, at<void>(norm), eps, h.x, h.stride}, bf16, threads);
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
  m.def("decode_attend_next", [](const std::string& name, const py::tuple& queries, const py::tuple& keys,
                                 const py::tuple& values, uintptr_t last, const py::tuple& cache_, float scale,
                                 uintptr_t out, bool bf16, int threads) {
    const DecodeKernels& kernels = find(name);
    const Heads q = heads(queries), k = heads(keys), v = heads(values);
    const Cache c = cache(cache_);
    py::gil_scoped_release unlocked;
    kernels.attend_next(q, k, v, at<int64_t>(last), c, scale, at<void>(out), bf16, threads);
  });
  m.def("decode_attend_pack", [](const std::string& name, const py::tuple& queries, const py::tuple& keys,
                                 const py::tuple& values, uintptr_t bounds, int64_t documents, float scale, uintptr_t out,
                                 uintptr_t lse, bool bf16, int threads) {
    const DecodeKernels& kernels = find(name);
    const Heads q = heads(queries), k = heads(keys), v = heads(values);
    py::gil_scoped_release unlocked;
    kernels.attend_pack(q, k, v, at<int64_t>(bounds), documents, scale, at<void>(out), at<float>(lse), bf16, threads);
  });
  m.def("decode_attend_pack_backward", [](const std::string& name, const py::tuple& queries, const py::tuple& keys,
                                          const py::tuple& values, uintptr_t bounds_, int64_t documents, float scale,
                                          const std::array<uintptr_t, 3>& forward,
                                          const std::array<uintptr_t, 4>& gradients, int threads) {
    const DecodeKernels& kernels = find(name);
    const Heads q = heads(queries), k = heads(keys), v = heads(values);
    const int64_t* bounds = at<int64_t>(bounds_);
    py::gil_scoped_release unlocked;
    std::vector<int64_t> order(static_cast<size_t>(documents));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return bounds[a + 1] - bounds[a] > bounds[b + 1] - bounds[b];
    });
    const PackGradients g{order.data(), at<float>(forward[0]), at<float>(forward[1]), at<float>(forward[2]),
                          at<float>(gradients[0]), at<float>(gradients[1]), at<float>(gradients[2]),
                          at<float>(gradients[3])};
    kernels.attend_pack_backward(q, k, v, bounds, documents, scale, g, threads);
  });
  m.def("decode_swiglu", [](const std::string& name, uintptr_t gate_up, int64_t rows, int64_t width, uintptr_t out,
                            bool bf16, int threads) {
    const DecodeKernels& k = find(name);
    py::gil_scoped_release unlocked;
    const uintptr_t up = gate_up + width * (bf16 ? 2 : 4);
    k.swiglu(at<void>(gate_up), at<void>(up), 2 * width, rows, width, at<void>(out), bf16, threads);
  });
  m.def("decode_panel", [] { return decode_kernels("")->panel; });
  m.def("decode_pack", [](uintptr_t weight, int64_t width, int64_t depth, bool gated, uintptr_t panels, int threads) {
    const DecodeKernels& k = *decode_kernels("");
    py::gil_scoped_release unlocked;
    k.pack(at<uint16_t>(weight), width, depth, gated, at<uint16_t>(panels), threads);
  });
  m.def("decode_linear", [](uintptr_t x, int64_t rows, int64_t depth, int64_t width, uintptr_t panels, uintptr_t bias,
                            bool gated, uintptr_t out, bool fp32, int threads) {
    const DecodeKernels& k = *decode_kernels("");
    py::gil_scoped_release unlocked;
    k.linear({at<uint16_t>(x), rows, depth, width, at<uint16_t>(panels), at<uint16_t>(bias), gated, at<void>(out), fp32},
             threads);
  });
}

}  // namespace dasd
