// attention.hpp for Python. Tensors arrive as (address, token stride, head stride); kernels/dasd_kernels/attention.py,
// the one caller, has checked them. The GIL is released while working.
#include "module.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "attention.hpp"

namespace py = pybind11;

namespace dasd {
namespace {

using namespace attention;

Heads heads(const py::tuple& t) {
  return {reinterpret_cast<uint16_t*>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>()};
}

float* floats(uintptr_t address) { return reinterpret_cast<float*>(address); }

struct Documents {
  std::vector<int64_t> bounds, order;
  explicit Documents(const std::vector<int64_t>& lengths) : bounds(lengths.size() + 1), order(lengths.size()) {
    std::partial_sum(lengths.begin(), lengths.end(), bounds.begin() + 1);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  }
  Pack pack(const py::tuple& t) const {  // heads, groups, width, scale
    return {bounds.data(), order.data(), static_cast<int64_t>(order.size()), bounds.back(), t[0].cast<int64_t>(),
            t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<float>()};
  }
};

void attention_forward(const std::vector<int64_t>& lengths, const py::tuple& shape, const py::tuple& q,
                       const py::tuple& k, const py::tuple& v, const py::tuple& out, uintptr_t lse, int threads) {
  const Documents documents(lengths);
  const Pack pack = documents.pack(shape);
  const Heads hq = heads(q), hk = heads(k), hv = heads(v), ho = heads(out);
  py::gil_scoped_release unlocked;
  forward(pack, hq, hk, hv, ho, floats(lse), threads);
}

// inputs are q, k, v, out, dout; gradients dq, dk, dv.
void attention_backward(const std::vector<int64_t>& lengths, const py::tuple& shape, const py::tuple& inputs,
                        uintptr_t lse, const py::tuple& gradients, uintptr_t partial, int threads) {
  const Documents documents(lengths);
  const Pack pack = documents.pack(shape);
  Heads x[5], g[3];
  for (size_t i = 0; i < 5; ++i) x[i] = heads(inputs[i].cast<py::tuple>());
  for (size_t i = 0; i < 3; ++i) g[i] = heads(gradients[i].cast<py::tuple>());
  py::gil_scoped_release unlocked;
  backward(pack, x[0], x[1], x[2], x[3], floats(lse), x[4], g[0], g[1], g[2], floats(partial), threads);
}

}  // namespace

void add_attention(py::module_& m) {
#ifndef DASD_X86
  m.def("attention_supported", [] { return false; });
#else
  m.def("attention_supported", &supported);
  m.def("attention_forward", &attention_forward, py::arg("lengths"), py::arg("shape"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("threads"));
  m.def("attention_backward", &attention_backward, py::arg("lengths"), py::arg("shape"), py::arg("inputs"),
        py::arg("lse"), py::arg("gradients"), py::arg("partial"), py::arg("threads"));
#endif
}

}  // namespace dasd
