// The Python module dasd_kernels._C: numpy arrays in and out, no torch headers, so that one build serves
// every torch. Arguments are checked in Python (kernels/dasd_kernels); here only what memory safety needs.
// The GIL is released while working.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "linear_ce/module.hpp"
#include "packing/assemble.hpp"
#include "packing/plan.hpp"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Hands a vector's memory to numpy without a copy.
template <typename T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owner->data();
  const auto size = static_cast<py::ssize_t>(owner->size());
  py::capsule release(owner.release(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(size, data, release);
}

py::tuple plan_packs(const Array<int64_t>& lengths, int64_t capacity, int64_t pack_budget, int32_t ranks,
                     uint64_t seed, uint64_t epoch, int64_t window, double linear, double quadratic) {
  const dasd::PlanRequest request{lengths.data(), lengths.size(), capacity, pack_budget, window,
                                  ranks,          seed,           epoch,    linear,      quadratic};
  dasd::Plan plan;
  {
    py::gil_scoped_release unlocked;
    plan = dasd::plan_packs(request);
  }
  return py::make_tuple(to_numpy(std::move(plan.docs)), to_numpy(std::move(plan.pack_offsets)),
                        to_numpy(std::move(plan.step_offsets)), to_numpy(std::move(plan.rank)),
                        to_numpy(std::move(plan.cost)), to_numpy(std::move(plan.tokens)));
}

// out: int64 [3, capacity], filled with tokens, labels and positions.
py::tuple assemble_pack(const Array<uint32_t>& tokens, const Array<int64_t>& offsets,
                        const Array<int32_t>& loss_spans, const Array<int64_t>& docs, Array<int64_t>& out,
                        bool elementwise) {
  if (out.ndim() != 2 || out.shape(0) != 3 || offsets.size() < 1 || loss_spans.size() % 3 != 0) {
    throw std::invalid_argument("assemble_pack: out must be [3, capacity], offsets [D + 1], loss_spans [K, 3]");
  }
  const dasd::Shard shard{tokens.data(),    tokens.size(),          offsets.data(), offsets.size() - 1,
                          loss_spans.data(), loss_spans.size() / 3};
  const int64_t capacity = out.shape(1);
  int64_t* rows = out.mutable_data();
  const auto assemble = elementwise ? dasd::assemble_pack_elementwise : dasd::assemble_pack;
  dasd::PackInfo info;
  {
    py::gil_scoped_release unlocked;
    info = assemble(shard, docs.data(), docs.size(), capacity, rows, rows + capacity, rows + 2 * capacity);
  }
  return py::make_tuple(to_numpy(std::move(info.cu_seqlens)), info.max_seqlen, info.num_valid, info.num_tokens);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of dasd_kernels; call them through dasd_kernels.";
  m.def("plan_packs", &plan_packs, py::arg("lengths").noconvert(), py::arg("capacity"), py::arg("pack_budget"),
        py::arg("ranks"), py::arg("seed"), py::arg("epoch"), py::arg("window"), py::arg("linear"),
        py::arg("quadratic"));
  m.def("assemble_pack", &assemble_pack, py::arg("tokens").noconvert(), py::arg("offsets").noconvert(),
        py::arg("loss_spans").noconvert(), py::arg("docs").noconvert(), py::arg("out").noconvert(),
        py::arg("elementwise") = false);
  dasd::add_linear_ce(m);
}
