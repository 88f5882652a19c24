// pointwise.hpp for Python. Tensors arrive as addresses; kernels/dasd_kernels/pointwise.py, the one caller, has checked
// them. The GIL is released while working.
#include "module.hpp"

#include <pybind11/stl.h>

#include <array>

#include "decode/decode.hpp"
#include "pointwise.hpp"

namespace py = pybind11;

namespace dasd {
namespace {

using namespace pointwise;
using Address = uintptr_t;
const void* in(Address a) { return reinterpret_cast<const void*>(a); }
void* out(Address a) { return reinterpret_cast<void*>(a); }
float* floats(Address a) { return reinterpret_cast<float*>(a); }
uint16_t* halves(Address a) { return reinterpret_cast<uint16_t*>(a); }
const DecodeKernels& widest() { return *decode_kernels(""); }

}  // namespace

void add_pointwise(py::module_& m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.attr("norm_parts") = kNormParts;
  m.def("rms_norm",
        [](Address x, Address weight, int64_t rows, int64_t width, bool bf16, float eps, Address y, Address rstd,
           int threads) {
          widest().add_rms_norm({out(x), nullptr, in(weight), out(y), floats(rstd), rows, width, eps}, bf16, threads);
        },
        unlocked);
  m.def("rms_norm_backward",
        [](Address x, Address weight, int64_t rows, int64_t width, bool bf16, Address rstd, Address dy, Address dx,
           Address dweight, Address partial, int threads) {
          rms_norm_backward({in(x), in(weight), rows, width, bf16}, floats(rstd), in(dy), out(dx), out(dweight),
                            floats(partial), threads);
        },
        unlocked);
  m.def("swiglu",
        [](Address gate, Address up, Address y, int64_t rows, int64_t width, bool bf16, int threads) {
          widest().swiglu(in(gate), in(up), width, rows, width, out(y), bf16, threads);
        },
        unlocked);
  m.def("swiglu_backward",
        [](Address gate, Address up, Address dy, Address dgate, Address dup, int64_t count, bool bf16, int threads) {
          swiglu_backward(in(gate), in(up), in(dy), out(dgate), out(dup), count, bf16, threads);
        },
        unlocked);
  m.def("rotate",
        [](Address x, int64_t stride, Address cos, Address sin, float sign, Address y, int64_t tokens, int64_t heads,
           int64_t dim, bool bf16, int threads) {
          widest().rotate({out(x), stride, tokens, heads, dim},
                          {floats(cos), floats(sin), sign, nullptr, 0.f, out(y), heads * dim}, bf16, threads);
        },
        unlocked);
  m.def("sum_of_squares",
        [](Address x, int64_t count, bool bf16, int threads) { return sum_of_squares(in(x), count, bf16, threads); },
        unlocked);
  m.def("adamw",
        [](Address weight, Address low, Address first, Address second, bool compact, Address grad,
           std::array<float, 7> options, uint32_t place, uint32_t seed, int64_t count, bool bf16, int threads) {
          const auto [scale, beta1, beta2, rate, root, eps, decay] = options;
          adamw({out(weight), halves(low), out(first), out(second), compact}, in(grad),
                {scale, beta1, beta2, rate, root, eps, decay, place, seed}, count, bf16, threads);
        },
        unlocked);
}

}  // namespace dasd
