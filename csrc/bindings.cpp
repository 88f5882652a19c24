// The Python module dasd_kernels._C: numpy arrays in and out, no torch headers, so that one build serves
// every torch. Arguments are checked in Python (kernels/dasd_kernels); here only what memory safety needs.
// The GIL is released while working.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <span>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/module.hpp"
#include "decode/module.hpp"
#include "linear_ce/module.hpp"
#include "packing/assemble.hpp"
#include "packing/plan.hpp"
#include "packing/rows.hpp"
#include "packing/stage.hpp"
#include "pointwise/module.hpp"

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

// sets: (tokens uint32 [total], offsets int64 [D + 1], loss_spans int32 [K, 3]) a set, their documents numbered
// through. Tokens on a device come as (address, total).
dasd::Shards shards_of(const py::sequence& sets) {
  std::vector<dasd::Shard> shards;
  for (const py::handle set : sets) {
    const auto [tokens, offsets, spans] = set.cast<std::tuple<py::object, Array<int64_t>, Array<int32_t>>>();
    if (offsets.size() < 1 || spans.size() % 3 != 0) {
      throw std::invalid_argument("offsets must be [D + 1], loss_spans [K, 3]");
    }
    dasd::Shard shard{nullptr, 0, offsets.data(), offsets.size() - 1, spans.data(), spans.size() / 3};
    if (py::isinstance<py::tuple>(tokens)) {
      const auto [address, total] = tokens.cast<std::tuple<uintptr_t, int64_t>>();
      shard.tokens = reinterpret_cast<const uint32_t*>(address);
      shard.total = total;
    } else {
      const auto array = tokens.cast<Array<uint32_t>>();
      shard.tokens = array.data();
      shard.total = array.size();
    }
    shards.push_back(shard);
  }
  return dasd::Shards(std::move(shards));
}

std::vector<dasd::Pack> resolve(const py::sequence& sets, const std::vector<Array<int64_t>>& packs, int32_t capacity) {
  const dasd::Shards shards = shards_of(sets);
  std::vector<std::span<const int64_t>> docs;
  for (const auto& pack : packs) docs.emplace_back(pack.data(), static_cast<size_t>(pack.size()));
  py::gil_scoped_release unlocked;
  std::vector<dasd::Pack> resolved;
  for (const auto& pack : docs) resolved.push_back(dasd::resolve(shards, pack, capacity));
  return resolved;
}

// The arrays behind `sets` must outlive the call; out: int64 [3, capacity].
py::tuple assemble_pack(const py::sequence& sets, const Array<int64_t>& docs, Array<int64_t>& out) {
  if (out.ndim() != 2 || out.shape(0) != 3) throw std::invalid_argument("assemble_pack: out must be [3, capacity]");
  const int64_t capacity = out.shape(1);
  dasd::Pack pack = std::move(resolve(sets, {docs}, static_cast<int32_t>(capacity)).front());
  std::vector<int64_t> valid(static_cast<size_t>(pack.num_valid));
  int64_t* rows = out.mutable_data();
  {
    py::gil_scoped_release unlocked;
    dasd::assemble_pack(pack, {rows, rows + capacity, rows + 2 * capacity, valid.data()});
  }
  return py::make_tuple(to_numpy(std::move(pack.cu_seqlens)), to_numpy(std::move(valid)), pack.max_seqlen, pack.used);
}

py::array_t<int64_t> label_counts(const Array<int32_t>& spans, const Array<int64_t>& docs) {
  const dasd::Shard shard{nullptr, 0, nullptr, 0, spans.data(), spans.size() / 3};
  std::vector<int64_t> counts(static_cast<size_t>(docs.size()));
  {
    py::gil_scoped_release unlocked;
    dasd::label_counts(shard, {docs.data(), counts.size()}, counts.data());
  }
  return to_numpy(std::move(counts));
}

// The packs of a Stage: (where cu_seqlens lie in the buffer, their number, max_seqlen, num_valid, tokens) each.
std::vector<std::array<int64_t, 5>> describe(const dasd::Stage& stage) {
  std::vector<std::array<int64_t, 5>> facts;
  for (size_t i = 0; i < stage.packs().size(); ++i) {
    const dasd::Pack& pack = stage.packs()[i];
    facts.push_back({stage.cu_seqlens(i), static_cast<int64_t>(pack.cu_seqlens.size()), pack.max_seqlen,
                     pack.num_valid, pack.used});
  }
  return facts;
}

// What rows.cu does, on rows of uint32 [count, D], by the same words: 16 bytes where they fit. For tests.
void copy_rows(const Array<uint32_t>& from, const Array<int64_t>& valid, Array<uint32_t>& to, bool scatter) {
  const auto copy = [&](auto word) {
    using Word = decltype(word);
    const auto* source = reinterpret_cast<const Word*>(from.data());
    auto* target = reinterpret_cast<Word*>(to.mutable_data());
    const int64_t words = from.shape(1) * 4 / int64_t{sizeof(Word)};
    if (scatter) {
      dasd::scatter_all(source, valid.data(), valid.size(), to.shape(0), words, target);
    } else {
      dasd::gather_all(source, valid.data(), valid.size(), words, target);
    }
  };
  if (dasd::by_lines(from.data(), to.data(), from.shape(1) * 4)) {
    copy(dasd::Line{});
  } else {
    copy(uint32_t{});
  }
}

void add_packing(py::module_& m) {
  m.def("plan_packs", &plan_packs, py::arg("lengths").noconvert(), py::arg("capacity"), py::arg("pack_budget"),
        py::arg("ranks"), py::arg("seed"), py::arg("epoch"), py::arg("window"), py::arg("linear"),
        py::arg("quadratic"));
  m.def("assemble_pack", &assemble_pack, py::arg("sets"), py::arg("docs").noconvert(), py::arg("out").noconvert());
  m.def("label_counts", &label_counts, py::arg("loss_spans").noconvert(), py::arg("docs").noconvert());
  py::class_<dasd::Stage>(m, "Stage")
      .def(py::init([](const py::sequence& sets, const std::vector<Array<int64_t>>& packs, int32_t capacity,
                       bool resident) { return dasd::Stage(resolve(sets, packs, capacity), resident); }),
           py::keep_alive<1, 2>())
      .def_property_readonly("bytes", &dasd::Stage::bytes)
      .def("describe", &describe)
      .def("write",
           [](const dasd::Stage& stage, uintptr_t host, uintptr_t device, uintptr_t rows, int64_t stride,
              uintptr_t valid) { stage.write(reinterpret_cast<char*>(host), device, rows, stride, valid); },
           py::call_guard<py::gil_scoped_release>());
  m.def("copy_rows", &copy_rows, py::arg("source").noconvert(), py::arg("valid").noconvert(), py::arg("to").noconvert(),
        py::arg("scatter"));
  m.def("run_jobs", [](uintptr_t stage, int64_t packs) {
    dasd::run_jobs(reinterpret_cast<const dasd::Job*>(stage), packs);
  });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of dasd_kernels; call them through dasd_kernels.";
  add_packing(m);
  dasd::add_attention(m);
  dasd::add_decode(m);
  dasd::add_linear_ce(m);
  dasd::add_pointwise(m);
}
