// linear_ce.hpp for Python. Tensors arrive as addresses; kernels/dasd_kernels/cpu.py, the one caller, has checked shapes,
// strides and labels and sized every buffer. The GIL is released while working.
#include "module.hpp"

#include <cstdlib>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

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

struct Block {
  void* data;
  int64_t size;
};

// Memory for a State or dW, exported as a buffer of `bytes`. First touch of fresh memory costs as much as a third of a
// product, so the largest block of up to `keep` bytes, or from `keep_from` on, that came back is kept for the next call that
// needs half of it; the large ones in steps of kLarge, since calls differ a little and what nobody touches takes no memory.
// All of it happens under the GIL.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(bytes) {
    if (kept_.size >= bytes && kept_.size / 2 <= bytes) {
      block_ = std::exchange(kept_, Block{});
      return;
    }
    if (kept_.size < bytes) release();
    const int64_t step = bytes < keep_from ? kPage : kLarge;
    block_.size = (bytes + step - 1) / step * step;
    block_.data = std::aligned_alloc(kPage, block_.size);
    if (!block_.data) throw std::bad_alloc();
  }
  ~Workspace() {
    if (keeps(block_.size) && block_.size > kept_.size) std::swap(block_, kept_);
    std::free(block_.data);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  static bool keeps(int64_t size) { return size <= keep || size >= keep_from; }
  static void release() { std::free(std::exchange(kept_, Block{}).data); }
#ifdef __SANITIZE_ADDRESS__
  static inline int64_t keep = 0;  // a block of just the asked size, so that accesses beyond it are found
#else
  static inline int64_t keep = 256 << 20;
#endif
  static inline int64_t keep_from = std::numeric_limits<int64_t>::max();
  bool spent = false;  // overwritten by what was made of it

  py::buffer_info info() const { return {static_cast<uint8_t*>(block_.data), bytes_}; }

 private:
  static constexpr int64_t kPage = 4096, kLarge = 64 << 20;
  static inline Block kept_{};
  Block block_{};
  int64_t bytes_;
};

py::object describe(const std::string& name) {
  const Kernels* found = kernels(name.c_str());
  if (!found) return py::none();
  return py::make_tuple(found->element_size, found->panel, found->block);
}

void forward(const std::string& name, const py::tuple& head_, const py::tuple& rows_, const py::tuple& scores_,
             const py::object& state_, int threads) {
  const Kernels& k = find(name);
  const Head h = head(head_);
  const Rows r = rows(rows_);
  const Scores s{address<float>(scores_[0]), address<float>(scores_[1]), address<float>(scores_[2]),
                 address<int64_t>(scores_[3])};
  const bool train = !state_.is_none();
  const State kept = train ? state(state_.cast<py::tuple>()) : State{};
  py::gil_scoped_release unlocked;
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
  py::class_<Workspace>(m, "Workspace", py::buffer_protocol())
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer([](Workspace& w) { return w.info(); })
      .def_readwrite("spent", &Workspace::spent)
      .def_readwrite_static("keep", &Workspace::keep)
      .def_readwrite_static("keep_from", &Workspace::keep_from)
      .def_property_readonly("address", [](const Workspace& w) { return reinterpret_cast<uintptr_t>(w.info().ptr); })
      .def_static("keeps", &Workspace::keeps, py::arg("size"))
      .def_static("release", &Workspace::release);
  m.def("linear_ce_describe", &describe, py::arg("name"));
  m.def("linear_ce_forward", &forward, py::arg("name"), py::arg("head"), py::arg("rows"), py::arg("scores"),
        py::arg("state"), py::arg("threads"));
  m.def("linear_ce_weight_gradient", &weight_gradient, py::arg("name"), py::arg("head"), py::arg("rows"),
        py::arg("state"), py::arg("out"), py::arg("threads"));
}

}  // namespace dasd
