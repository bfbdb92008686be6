// The Python module imbsam_fast.ops._C: argument checks that need no torch, then the operations.
// The only file that sees pybind11. Every call releases the GIL while it computes.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/tiles.h"
#include "imbsam.h"
#include "lists.h"
#include "losses.h"
#include "phases.h"
#include "slots.h"
#include "tensors.h"

namespace py = pybind11;
using namespace imbsam;

imbsam::TensorReader imbsam::reader;

namespace {

uintptr_t address_of(py::handle item) {
  dlpack::Tensor tensor;
  if (reader.read(item.ptr(), &tensor)) return (uintptr_t)tensor.data + tensor.byte_offset;
  if (PyLong_Check(item.ptr())) return item.cast<uintptr_t>();
  return item.attr("data_ptr")().cast<uintptr_t>();
}

}  // namespace

template <>
struct pybind11::detail::type_caster<Pointers> {
  PYBIND11_TYPE_CASTER(Pointers, const_name("Sequence[Tensor | int]"));

  bool load(handle source, bool) {
    make_caster<TensorList> read;  // also one that another build of this module has read
    if (read.load(source, false)) {
      value = cast_op<const TensorList&>(read).addresses;
      return true;
    }
    if (!PySequence_Check(source.ptr())) return false;
    value.reserve(len(source));
    for (handle item : source) value.push_back(address_of(item));
    return true;
  }
};

template <>
struct pybind11::detail::type_caster<Sizes> {
  PYBIND11_TYPE_CASTER(Sizes, const_name("Sequence[int] | TensorList"));

  bool load(handle source, bool) {
    make_caster<TensorList> read;
    if (read.load(source, false)) {
      value = *cast_op<const TensorList&>(read).numel;
      return true;
    }
    if (!PySequence_Check(source.ptr())) return false;
    for (handle item : source) value.push_back(item.cast<int64_t>());
    return true;
  }
};

namespace {

// Whether each tensor of a has the dtype, device, shape and memory order of its namesake in b;
// None matches all. False where that cannot be told here.
bool pairs_match(const py::sequence& a, const py::sequence& b) {
  const size_t count = a.size();
  if (count != b.size()) return false;
  for (size_t i = 0; i < count; ++i) {
    const py::object first = a[i], second = b[i];
    dlpack::Tensor x, y;
    if (first.is_none() || second.is_none()) continue;
    if (!reader.read(first.ptr(), &x) || !reader.read(second.ptr(), &y) || !alike(x, y))
      return false;
  }
  return true;
}

void squared_norm(int dtype, const Sizes& numel, const Pointers& g_t,
                  const Pointers& theta, uintptr_t partials, int threads) {
  Lists lists("squared_norm", dtype, numel);
  lists.required("g_t", g_t);
  lists.optional("theta", theta);
  IMBSAM_CHECK(partials || lists.chunks() == 0, "squared_norm: partials is a null pointer");
  cpu::squared_norm(lists.table(), in(g_t), in(theta), (double*)pointer(partials), threads);
}

void perturb_(int dtype, const Sizes& numel, const Pointers& theta,
              const Pointers& g_t, const Pointers& master, const Pointers& held,
              uintptr_t partials, int64_t partial_count, double rho, bool adaptive, int threads) {
  Lists lists("perturb_", dtype, numel);
  lists.required("theta", theta);
  lists.required("g_t", g_t);
  lists.kept_with(master);
  lists.optional("held", held);
  lists.disjoint();
  IMBSAM_CHECK(partials || partial_count == 0, "perturb_: partials is a null pointer");
  cpu::perturb_(lists.table(), out(theta), out(g_t), in(master), out(held),
                (const double*)pointer(partials), partial_count, rho, adaptive, threads);
}

// step: counts on the host, which a step that is not skipped advances; [] for none.
void update_(const std::string& op, int dtype, const Sizes& numel,
             const Pointers& theta, const Pointers& saved, const Pointers& g_h,
             const Pointers& g_p, const std::vector<Pointers>& state, const Pointers& master,
             const Pointers& step, int step_dtype, double lr, const std::vector<double>& settings,
             bool maximize, double grad_scale, bool skip, int threads) {
  const Base base = base_of(op);
  Lists lists(entry(base).op, dtype, numel);
  const UpdateLists found = checked(lists, base, {theta, saved, g_h, g_p, state, master});
  const UpdateSettings of_step = checked(base, lr, settings, maximize, grad_scale, skip);
  const StepCounts counts(base, step, step_dtype, numel.size());
  cpu::update_(base, lists.table(), found, counts.next(), of_step, threads);
  if (!skip) counts.advance();
}

// Whether the formula of the base needs the steps taken.
bool needs_counts(const std::string& op) { return entry(base_of(op)).counts; }

void merge_(int dtype, const Sizes& numel, const Pointers& theta,
            const Pointers& saved, const Pointers& g_h, const Pointers& g_p, int threads) {
  Lists lists("merge_", dtype, numel);
  lists.required("theta", theta);
  lists.optional("saved", saved);
  lists.optional("g_h", g_h);
  lists.required("g_p", g_p);
  lists.disjoint();
  cpu::merge_(lists.table(), out(theta), in(saved), in(g_h), out(g_p), threads);
}

bool grad_check(int dtype, const Sizes& numel, const Pointers& g_h,
                const Pointers& g_p, uintptr_t partials, int threads) {
  Lists lists("grad_check", dtype, numel);
  lists.optional("g_h", g_h);
  lists.required("g_p", g_p);
  IMBSAM_CHECK(partials || lists.chunks() == 0, "grad_check: partials is a null pointer");
  return cpu::grad_check(lists.table(), in(g_h), in(g_p), (double*)pointer(partials), threads);
}

double bandwidth(const std::string& kind, bool stream, uintptr_t a, uintptr_t b, uintptr_t c,
                 int64_t numel, int threads) {
  const std::vector<std::string> kinds = {"read", "copy", "triad"};  // cpu::Traffic
  const auto traffic = std::find(kinds.begin(), kinds.end(), kind) - kinds.begin();
  IMBSAM_CHECK(traffic < 3,
               "bandwidth: kind is '" << kind << "', expected read, copy or triad");
  IMBSAM_CHECK(!stream || traffic > 0, "bandwidth: stream is true, expected false for read");
  IMBSAM_CHECK(numel >= 0, "bandwidth: numel is " << numel << ", expected >= 0");
  const std::pair<const char*, uintptr_t> arrays[] = {{"b", b}, {"a", a}, {"c", c}};
  for (int i = 0; i <= traffic; ++i) {
    const auto& [name, address] = arrays[i];
    IMBSAM_CHECK(address || numel == 0, "bandwidth: " << name << " is a null pointer");
    IMBSAM_CHECK(address % 4 == 0,
                 "bandwidth: " << name << " is " << address << ", expected a multiple of 4");
  }
  return cpu::bandwidth((cpu::Traffic)traffic, stream, (float*)pointer(a), (float*)pointer(b),
                        (float*)pointer(c), numel, threads);
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (int i = 0; i < cpu::isa_count(); ++i) names.push_back(cpu::isa_name(i));
  return names;
}

// ---------------------------------------------------------------- CUDA

// For tests: (launch, tensor, first element, elements) of every tile, as sgd_update_ finds them.
std::vector<std::tuple<int, int, int64_t, int>> cuda_tiles(const std::vector<int64_t>& numel,
                                                           int tile_elements) {
  const Table tensors = {DType::float32, (int64_t)numel.size(), numel.data()};
  std::vector<const void*> indices;  // in place of addresses, to tell the tensors apart
  for (size_t i = 0; i < numel.size(); ++i) indices.push_back(reinterpret_cast<void*>(i + 1));
  const auto table = std::make_unique<cuda::TensorTable<5>>();
  std::vector<std::tuple<int, int, int64_t, int>> found;
  int launch = 0;
  for (const auto& batch : cuda::batches(tensors, table->kCapacity, tile_elements)) {
    fill(*table, batch, tensors, {indices.data(), nullptr, nullptr, nullptr, nullptr},
         tile_elements);
    for (int tile = 0; tile < batch.tiles; ++tile) {
      const cuda::Tile at = cuda::locate(*table, tile, tile_elements);
      const int tensor = (int)reinterpret_cast<uintptr_t>(table->data[0][at.tensor]) - 1;
      found.emplace_back(launch, tensor, at.begin, at.elements);
    }
    ++launch;
  }
  return found;
}

#if defined(IMBSAM_CUDA)

std::optional<std::string> cuda_reason_unavailable() {
  const char* reason = cuda::reason_unavailable();
  return reason ? std::optional<std::string>(reason) : std::nullopt;
}

void cuda_squared_norm(int dtype, const Sizes& numel, const Pointers& g_t,
                       const Pointers& theta, uintptr_t partials, int device, uintptr_t stream) {
  Lists lists("squared_norm", dtype, numel);
  lists.required("g_t", g_t);
  lists.optional("theta", theta);
  IMBSAM_CHECK(partials || lists.chunks() == 0, "squared_norm: partials is a null pointer");
  cuda::squared_norm(lists.table(), in(g_t), in(theta), (double*)pointer(partials),
                     on(device, stream));
}

void cuda_perturb_(int dtype, const Sizes& numel, const Pointers& theta,
                   const Pointers& g_t, const Pointers& master, const Pointers& held,
                   uintptr_t partials, int64_t partial_count, double rho, bool adaptive,
                   int device, uintptr_t stream) {
  Lists lists("perturb_", dtype, numel);
  lists.required("theta", theta);
  lists.required("g_t", g_t);
  lists.kept_with(master);
  lists.optional("held", held);
  lists.disjoint();
  IMBSAM_CHECK(partials || partial_count == 0, "perturb_: partials is a null pointer");
  cuda::perturb_(lists.table(), out(theta), out(g_t), in(master), out(held),
                 (const double*)pointer(partials), partial_count, rho, adaptive,
                 on(device, stream));
}

// step: one float a tensor on the device, which is only read; [] where the base needs none.
void cuda_update_(const std::string& op, int dtype, const Sizes& numel,
                  const Pointers& theta, const Pointers& saved, const Pointers& g_h,
                  const Pointers& g_p, const std::vector<Pointers>& state, const Pointers& master,
                  const Pointers& step, double lr, const std::vector<double>& settings,
                  bool maximize, double grad_scale, bool skip, uintptr_t lr_at,
                  uintptr_t grad_scale_at, uintptr_t found_inf_at, int device, uintptr_t stream) {
  const Base base = base_of(op);
  Lists lists(entry(base).op, dtype, numel);
  const UpdateLists found = checked(lists, base, {theta, saved, g_h, g_p, state, master});
  const UpdateSettings of_step = checked(base, lr, settings, maximize, grad_scale, skip);
  const size_t expected = entry(base).counts ? numel.size() : 0;
  IMBSAM_CHECK(step.size() == expected && std::count(step.begin(), step.end(), 0) == 0,
               op << ": step has " << step.size() << " tensors, expected " << expected
                  << ", none of them a null pointer");
  cuda::update_(base, lists.table(), found, in(step), of_step,
                {pointer(lr_at), pointer(grad_scale_at), pointer(found_inf_at)},
                on(device, stream));
}

void cuda_merge_(int dtype, const Sizes& numel, const Pointers& theta,
                 const Pointers& saved, const Pointers& g_h, const Pointers& g_p, int device,
                 uintptr_t stream) {
  Lists lists("merge_", dtype, numel);
  lists.required("theta", theta);
  lists.optional("saved", saved);
  lists.optional("g_h", g_h);
  lists.required("g_p", g_p);
  lists.disjoint();
  cuda::merge_(lists.table(), out(theta), in(saved), in(g_h), out(g_p), on(device, stream));
}

void cuda_grad_check(int dtype, const Sizes& numel, const Pointers& g_h,
                     const Pointers& g_p, uintptr_t partials, uintptr_t found_inf, int device,
                     uintptr_t stream) {
  Lists lists("grad_check", dtype, numel);
  lists.optional("g_h", g_h);
  lists.required("g_p", g_p);
  IMBSAM_CHECK(partials || lists.chunks() == 0, "grad_check: partials is a null pointer");
  IMBSAM_CHECK(found_inf, "grad_check: found_inf is a null pointer");
  cuda::grad_check(lists.table(), in(g_h), in(g_p), (double*)pointer(partials),
                   (float*)pointer(found_inf), on(device, stream));
}

void define_cuda(py::module_& module) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("cuda_reason_unavailable", &cuda_reason_unavailable, release);
  module.def("cuda_squared_norm", &cuda_squared_norm, release);
  module.def("cuda_perturb_", &cuda_perturb_, release);
  module.def("cuda_update_", &cuda_update_, release);
  module.def("cuda_merge_", &cuda_merge_, release);
  module.def("cuda_grad_check", &cuda_grad_check, release);
  module.def("cuda_split_cross_entropy", &cuda_split_cross_entropy, release);
  module.def("cuda_split_cross_entropy_backward", &cuda_split_cross_entropy_backward, release);
  module.def("cuda_split_soft_cross_entropy", &cuda_split_soft_cross_entropy, release);
  module.def("cuda_split_soft_cross_entropy_backward", &cuda_split_soft_cross_entropy_backward,
             release);
}

#endif

// ---------------------------------------------------------------- phases

// threads: 0 for CUDA. rho and adaptive are those of each group.
bool perturb_all(const std::vector<size_t>& groups, const py::list& params, const py::list& g_t,
                 const py::dict& state, const std::optional<py::dict>& versions,
                 const std::vector<double>& rho, const std::vector<bool>& adaptive,
                 const py::object& empty, const py::object& pending, int threads, int device,
                 uintptr_t stream) {
  const auto phase = Phase::read(groups, params, {g_t}, true, {state, {}, {}, false, versions});
  if (phase) phase->perturb(rho, adaptive, empty, pending, {threads, {device, pointer(stream)}});
  return phase != nullptr;
}

// names: what the base keeps of a parameter, and whether each group wants it; step: also a count.
// is_scaled: one that scalars on a device and grad_check serve.
std::unique_ptr<Phase> read_update(const std::vector<size_t>& groups, const py::list& params,
                                   const std::vector<py::list>& lists, const py::dict& state,
                                   const std::vector<py::str>& names,
                                   const std::vector<std::vector<bool>>& wanted, bool step,
                                   const std::optional<py::dict>& versions, bool is_scaled) {
  auto phase = Phase::read(groups, params, lists, false, {state, names, wanted, step, versions});
  const bool serves = phase && (!is_scaled || (phase->is_sorted_by_gradients() &&
                                               phase->is_of_one_arithmetic()));
  return serves ? std::move(phase) : nullptr;
}

void define_phases(py::module_& module) {
  module.def("perturb_all", &perturb_all);
  module.def("read_update", &read_update);
  py::class_<Phase>(module, "Phase", py::module_local())
      .def_property_readonly("is_double", &Phase::is_double)
      .def("grad_check",
           [](Phase& phase, const py::object& empty, const py::object& found_inf, int threads,
              int device, uintptr_t stream) {
             return phase.grad_check(empty, found_inf, {threads, {device, pointer(stream)}});
           })
      .def("update",
           [](Phase& phase, const std::string& op, const std::vector<double>& lr,
              const std::vector<std::vector<double>>& settings, const std::vector<bool>& maximize,
              double grad_scale, bool skip, uintptr_t grad_scale_at, uintptr_t found_inf_at,
              const py::object& pending, int threads, int device, uintptr_t stream) {
             phase.update(op, lr, settings, maximize, grad_scale, skip,
                          {nullptr, pointer(grad_scale_at), pointer(found_inf_at)}, pending,
                          {threads, {device, pointer(stream)}});
           });
}

void define_slots(py::module_& module) {
  py::class_<TensorList>(module, "TensorList", py::module_local())
      .def("__len__", [](const TensorList& list) { return list.addresses.size(); })
      .def("__getitem__", [](const TensorList& list, py::handle i) {
        return py::object(list.tensors[i]);
      })
      .def("__iter__", [](const TensorList& list) { return py::iter(list.tensors); })
      .def_property_readonly("dtype_code", [](const TensorList& list) { return (int)list.dtype; })
      .def_property_readonly("chunks", [](const TensorList& list) {
        return Lists("", (int)list.dtype, *list.numel).chunks();
      });
  module.def("read_lists", &read_lists);
  module.def("take_gradients", &take_gradients);
  module.def("all_alone", &all_alone);
  module.def("state_of", &state_of);
  module.def("partition", &partition);
  module.def("occupancy", &occupancy);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.doc() = "Compiled operations of imbsam_fast on raw pointers; see csrc/imbsam.h.";
  module.def("squared_norm", &squared_norm, release);
  module.def("perturb_", &perturb_, release);
  module.def("update_", &update_, release);
  module.def("needs_counts", &needs_counts);
  module.def("merge_", &merge_, release);
  module.def("grad_check", &grad_check, release);
  module.def("split_cross_entropy", &split_cross_entropy, release);
  module.def("split_cross_entropy_backward", &split_cross_entropy_backward, release);
  module.def("split_soft_cross_entropy", &split_soft_cross_entropy, release);
  module.def("split_soft_cross_entropy_backward", &split_soft_cross_entropy_backward, release);
  module.def("bandwidth", &bandwidth, release);
  module.def("isas", &isas, "The instruction sets of this build that run here, best last.");
  module.def("isa_in_use", &cpu::isa_in_use);
  module.def("use_isa", [](const std::string& name) { cpu::use_isa(name.c_str()); });
  module.def("has_openmp", &cpu::has_openmp);
  module.def("last_level_cache_bytes", &cpu::last_level_cache_bytes);
  module.def("connect", [](py::type tensor, py::type parameter) {
    return reader.connect(tensor.ptr(), parameter.ptr());
  });
  module.def("pairs_match", &pairs_match);
  define_slots(module);
  define_phases(module);
  module.def("cuda_tiles", &cuda_tiles);
#if defined(IMBSAM_CUDA)
  define_cuda(module);
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
}
