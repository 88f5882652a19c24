// linear_ce.hpp for Python. Tensors arrive as addresses; kernels/dasd_kernels/cpu.py, the one caller, has checked shapes,
// strides and labels and sized every buffer. The GIL is released while working.
#include "module.hpp"

#include <stdexcept>
#include <string>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "linear_ce.hpp"

namespace py = pybind11;

namespace dasd {
namespace {

template <typename T>
T* address(const py::handle& value) { return reinterpret_cast<T*>(value.cast<uintptr_t>()); }

const Kernels& find(const std::string& name) {
  const Kernels* found = kernels(name.c_str());
  if (!found) throw std::invalid_argument("no linear_ce kernels named " + name + " on this CPU");
  return *found;
}

Head head(const py::tuple& t) {  // weight, dtype, row stride, column stride, bias, vocab, width, softcap
  return {address<const void>(t[0]),   static_cast<Dtype>(t[1].cast<int>()), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
          address<const float>(t[4]), t[5].cast<int64_t>(), t[6].cast<int64_t>(), t[7].cast<float>()};
}

Rows rows(const py::tuple& t) {  // x, dtype, count, labels, inverse temperature, coefficient, z_loss, label_smoothing
  return {address<const void>(t[0]),    static_cast<Dtype>(t[1].cast<int>()), t[2].cast<int64_t>(),
          address<const int64_t>(t[3]), address<const float>(t[4]),           address<const float>(t[5]),
          t[6].cast<float>(), t[7].cast<float>()};
}

State state(const py::tuple& t) {  // e, xs, dx, factor, hit, hit_saved
  return {address<void>(t[0]), address<void>(t[1]), address<float>(t[2]), address<float>(t[3]), address<float>(t[4]),
          address<float>(t[5])};
}

// Large buffers on large pages: E is read along both of its dimensions.
void on_large_pages([[maybe_unused]] void* p, [[maybe_unused]] int64_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

py::object describe(const std::string& name) {
  const Kernels* found = kernels(name.c_str());
  if (!found) return py::none();
  return py::make_tuple(found->element_size, found->panel);
}

void forward(const std::string& name, const py::tuple& head_, const py::tuple& rows_, const py::tuple& scores_,
             const py::object& state_, int64_t e_bytes, int threads) {
  const Kernels& k = find(name);
  const Head h = head(head_);
  const Rows r = rows(rows_);
  const Scores s{address<float>(scores_[0]), address<float>(scores_[1]), address<float>(scores_[2]),
                 address<int64_t>(scores_[3])};
  const bool train = !state_.is_none();
  const State kept = train ? state(state_.cast<py::tuple>()) : State{};
  py::gil_scoped_release unlocked;
  if (train) on_large_pages(kept.e, e_bytes);
  if (r.count > 0) k.forward(h, r, s, train ? &kept : nullptr, threads);
}

void weight_gradient(const std::string& name, const py::tuple& head_, const py::tuple& rows_, const py::tuple& state_,
                     const py::tuple& out_, int threads) {  // out, dtype, previous, everywhere, scale, accumulate, bias
  const Kernels& k = find(name);
  const Head h = head(head_);
  const Rows r = rows(rows_);
  const State kept = state(state_);
  const Output out{address<void>(out_[0]),        static_cast<Dtype>(out_[1].cast<int>()),
                   address<const float>(out_[2]), address<const float>(out_[3]),
                   out_[4].cast<float>(),         out_[5].cast<bool>(),
                   address<float>(out_[6])};
  py::gil_scoped_release unlocked;
  k.weight_gradient(h, r, kept, out, threads);
}

}  // namespace

void add_linear_ce(py::module_& m) {
  m.def("linear_ce_describe", &describe, py::arg("name"));
  m.def("linear_ce_forward", &forward, py::arg("name"), py::arg("head"), py::arg("rows"), py::arg("scores"),
        py::arg("state"), py::arg("e_bytes"), py::arg("threads"));
  m.def("linear_ce_weight_gradient", &weight_gradient, py::arg("name"), py::arg("head"), py::arg("rows"),
        py::arg("state"), py::arg("out"), py::arg("threads"));
}

}  // namespace dasd
