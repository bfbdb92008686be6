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
#include "tensors.h"

namespace py = pybind11;
using namespace imbsam;

namespace {

TensorReader reader;

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
    if (!PySequence_Check(source.ptr())) return false;
    value.reserve(len(source));
    for (handle item : source) value.push_back(address_of(item));
    return true;
  }
};

namespace {

// Whether ops.check_lists accepts these lists; false where that cannot be told here.
bool lists_match(const std::vector<py::sequence>& lists) {
  const size_t count = lists.empty() ? 0 : lists[0].size();
  if (count == 0) return false;
  std::vector<dlpack::Tensor> first;
  for (const py::sequence& list : lists) {
    const bool is_first = &list == &lists[0];
    if (list.size() != count && list.size() != 0) return false;
    size_t i = 0;
    for (py::handle item : list) {
      dlpack::Tensor tensor;
      if (!reader.read(item.ptr(), &tensor)) return false;
      if (is_first) {
        first.push_back(tensor);
        if (!is_supported(tensor) || !is_dense(tensor) || !same_kind(tensor, first[0])) return false;
      } else if (!alike(tensor, first[i++])) {
        return false;
      }
    }
  }
  return true;
}

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

// Whether one launch can take all these tensors. False where that cannot be told here.
bool one_kind(const py::sequence& tensors) {
  dlpack::Tensor first, tensor;
  bool is_first = true;
  for (py::handle item : tensors) {
    if (!reader.read(item.ptr(), &tensor)) return false;
    if (is_first) first = tensor;
    if (!same_kind(tensor, first)) return false;
    is_first = false;
  }
  return !is_first;
}

void squared_norm(int dtype, const std::vector<int64_t>& numel, const Pointers& g_t,
                  const Pointers& theta, uintptr_t partials, int threads) {
  Lists lists("squared_norm", dtype, numel);
  lists.required("g_t", g_t);
  lists.optional("theta", theta);
  IMBSAM_CHECK(partials || lists.chunks() == 0, "squared_norm: partials is a null pointer");
  cpu::squared_norm(lists.table(), in(g_t), in(theta), (double*)pointer(partials), threads);
}

void perturb_(int dtype, const std::vector<int64_t>& numel, const Pointers& theta,
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

void sgd_update_(int dtype, const std::vector<int64_t>& numel, const Pointers& theta,
                 const Pointers& saved, const Pointers& g_h, const Pointers& g_p,
                 const Pointers& m, const Pointers& master, double lr, double momentum,
                 double dampening, double weight_decay, bool nesterov, bool maximize,
                 double grad_scale, bool skip, int threads) {
  Lists lists("sgd_update_", dtype, numel);
  check_sgd_lists(lists, theta, saved, g_h, g_p, m, master);
  cpu::sgd_update_(lists.table(), out(theta), in(saved), in(g_h), in(g_p), out(m), out(master),
                   {lr, momentum, dampening, weight_decay, nesterov, maximize, grad_scale, skip},
                   threads);
}

// step: counts on the host, which a step that is not skipped advances.
void adam_update_(int dtype, const std::vector<int64_t>& numel, const Pointers& theta,
                  const Pointers& saved, const Pointers& g_h, const Pointers& g_p,
                  const Pointers& m, const Pointers& v, const Pointers& v_max,
                  const Pointers& master, const Pointers& step, int step_dtype, double lr,
                  double beta1, double beta2, double eps, double weight_decay, bool decoupled,
                  bool maximize, double grad_scale, bool skip, int threads) {
  Lists lists("adam_update_", dtype, numel);
  check_adam_lists(lists, theta, saved, g_h, g_p, m, v, v_max, master);
  const StepCounts counts(step, step_dtype, numel.size());
  cpu::adam_update_(lists.table(), out(theta), in(saved), in(g_h), in(g_p), out(m), out(v),
                    out(v_max), out(master), counts.next(),
                    {lr, beta1, beta2, eps, weight_decay, decoupled, maximize, grad_scale, skip},
                    threads);
  if (!skip) counts.advance();
}

void merge_(int dtype, const std::vector<int64_t>& numel, const Pointers& theta,
            const Pointers& saved, const Pointers& g_h, const Pointers& g_p, int threads) {
  Lists lists("merge_", dtype, numel);
  lists.required("theta", theta);
  lists.optional("saved", saved);
  lists.optional("g_h", g_h);
  lists.required("g_p", g_p);
  lists.disjoint();
  cpu::merge_(lists.table(), out(theta), in(saved), in(g_h), out(g_p), threads);
}

bool grad_check(int dtype, const std::vector<int64_t>& numel, const Pointers& g_h,
                const Pointers& g_p, uintptr_t partials, int threads) {
  Lists lists("grad_check", dtype, numel);
  lists.optional("g_h", g_h);
  lists.required("g_p", g_p);
  IMBSAM_CHECK(partials || lists.chunks() == 0, "grad_check: partials is a null pointer");
  return cpu::grad_check(lists.table(), in(g_h), in(g_p), (double*)pointer(partials), threads);
}

CrossEntropySettings checked(const char* op, int dtype, int64_t rows, int64_t classes,
                             int64_t row_stride, double label_smoothing, int64_t ignore_index,
                             std::initializer_list<std::pair<const char*, uintptr_t>> pointers) {
  IMBSAM_CHECK(dtype >= 0 && dtype <= 3, op << ": dtype is " << dtype << ", expected 0 to 3");
  IMBSAM_CHECK(rows >= 0 && classes > 0, op << ": logits is (" << rows << ", " << classes
                                            << "), expected (N, K) with K > 0");
  IMBSAM_CHECK(row_stride >= 0, op << ": row_stride is " << row_stride << ", expected >= 0");
  for (const auto& [name, address] : pointers)
    IMBSAM_CHECK(address || rows == 0, op << ": " << name << " is a null pointer");
  return {rows, classes, row_stride, label_smoothing, ignore_index};
}

void split_cross_entropy(int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                         uintptr_t logits, uintptr_t targets, uintptr_t plain, uintptr_t sharp,
                         uintptr_t class_weight, double label_smoothing, int64_t ignore_index,
                         std::optional<double> batch_size, uintptr_t head, uintptr_t tail,
                         uintptr_t b, uintptr_t lse, int threads) {
  const auto settings =
      checked("split_cross_entropy", dtype, rows, classes, row_stride, label_smoothing,
              ignore_index,
              {{"logits", logits}, {"targets", targets}, {"plain", plain}, {"sharp", sharp},
               {"head", head}, {"tail", tail}, {"b", b}, {"lse", lse}});
  cpu::split_cross_entropy((DType)dtype, settings, pointer(logits),
                           (const int64_t*)pointer(targets),
                           {pointer(plain), pointer(sharp), pointer(class_weight)},
                           batch_size.value_or(-1), pointer(head), pointer(tail), pointer(b),
                           pointer(lse), threads);
}

void split_cross_entropy_backward(int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                                  double grad_head, double grad_tail, uintptr_t logits,
                                  uintptr_t targets, uintptr_t lse, double b, uintptr_t plain,
                                  uintptr_t sharp, uintptr_t class_weight,
                                  double label_smoothing, int64_t ignore_index,
                                  uintptr_t grad_logits, int threads) {
  const auto settings =
      checked("split_cross_entropy_backward", dtype, rows, classes, row_stride, label_smoothing,
              ignore_index,
              {{"logits", logits}, {"targets", targets}, {"lse", lse}, {"plain", plain},
               {"sharp", sharp}, {"grad_logits", grad_logits}});
  cpu::split_cross_entropy_backward((DType)dtype, settings, grad_head, grad_tail, pointer(logits),
                                    (const int64_t*)pointer(targets), pointer(lse), b,
                                    {pointer(plain), pointer(sharp), pointer(class_weight)},
                                    pointer(grad_logits), threads);
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

cuda::Stream on(int device, uintptr_t stream) { return {device, pointer(stream)}; }

void cuda_squared_norm(int dtype, const std::vector<int64_t>& numel, const Pointers& g_t,
                       const Pointers& theta, uintptr_t partials, int device, uintptr_t stream) {
  Lists lists("squared_norm", dtype, numel);
  lists.required("g_t", g_t);
  lists.optional("theta", theta);
  IMBSAM_CHECK(partials || lists.chunks() == 0, "squared_norm: partials is a null pointer");
  cuda::squared_norm(lists.table(), in(g_t), in(theta), (double*)pointer(partials),
                     on(device, stream));
}

void cuda_perturb_(int dtype, const std::vector<int64_t>& numel, const Pointers& theta,
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

void cuda_sgd_update_(int dtype, const std::vector<int64_t>& numel, const Pointers& theta,
                      const Pointers& saved, const Pointers& g_h, const Pointers& g_p,
                      const Pointers& m, const Pointers& master, double lr, double momentum,
                      double dampening, double weight_decay, bool nesterov, bool maximize,
                      double grad_scale, bool skip, uintptr_t lr_at, uintptr_t grad_scale_at,
                      uintptr_t found_inf_at, int device, uintptr_t stream) {
  Lists lists("sgd_update_", dtype, numel);
  check_sgd_lists(lists, theta, saved, g_h, g_p, m, master);
  cuda::sgd_update_(lists.table(), out(theta), in(saved), in(g_h), in(g_p), out(m), out(master),
                    {lr, momentum, dampening, weight_decay, nesterov, maximize, grad_scale, skip},
                    {pointer(lr_at), pointer(grad_scale_at), pointer(found_inf_at)},
                    on(device, stream));
}

// step: one float a tensor on the device, which is only read.
void cuda_adam_update_(int dtype, const std::vector<int64_t>& numel, const Pointers& theta,
                       const Pointers& saved, const Pointers& g_h, const Pointers& g_p,
                       const Pointers& m, const Pointers& v, const Pointers& v_max,
                       const Pointers& master, const Pointers& step, double lr, double beta1,
                       double beta2, double eps, double weight_decay, bool decoupled,
                       bool maximize, double grad_scale, bool skip, uintptr_t lr_at,
                       uintptr_t grad_scale_at, uintptr_t found_inf_at, int device,
                       uintptr_t stream) {
  Lists lists("adam_update_", dtype, numel);
  check_adam_lists(lists, theta, saved, g_h, g_p, m, v, v_max, master);
  IMBSAM_CHECK(step.size() == numel.size() && std::count(step.begin(), step.end(), 0) == 0,
               "adam_update_: step has " << step.size() << " tensors, expected " << numel.size()
                                         << ", none of them a null pointer");
  cuda::adam_update_(lists.table(), out(theta), in(saved), in(g_h), in(g_p), out(m), out(v),
                     out(v_max), out(master), in(step),
                     {lr, beta1, beta2, eps, weight_decay, decoupled, maximize, grad_scale, skip},
                     {pointer(lr_at), pointer(grad_scale_at), pointer(found_inf_at)},
                     on(device, stream));
}

void cuda_merge_(int dtype, const std::vector<int64_t>& numel, const Pointers& theta,
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

void cuda_grad_check(int dtype, const std::vector<int64_t>& numel, const Pointers& g_h,
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

void cuda_split_cross_entropy(int dtype, int64_t rows, int64_t classes, int64_t row_stride,
                              uintptr_t logits, uintptr_t targets, uintptr_t plain,
                              uintptr_t sharp, uintptr_t class_weight, double label_smoothing,
                              int64_t ignore_index, std::optional<double> batch_size,
                              uintptr_t losses, uintptr_t head, uintptr_t tail, uintptr_t b,
                              uintptr_t lse, int device, uintptr_t stream) {
  const auto settings =
      checked("split_cross_entropy", dtype, rows, classes, row_stride, label_smoothing,
              ignore_index,
              {{"logits", logits}, {"targets", targets}, {"plain", plain}, {"sharp", sharp},
               {"losses", losses}, {"lse", lse}});
  IMBSAM_CHECK(head && tail && b, "split_cross_entropy: head, tail or b is a null pointer");
  cuda::split_cross_entropy((DType)dtype, settings, pointer(logits),
                            (const int64_t*)pointer(targets),
                            {pointer(plain), pointer(sharp), pointer(class_weight)},
                            batch_size.value_or(-1), (double*)pointer(losses), pointer(head),
                            pointer(tail), pointer(b), pointer(lse), on(device, stream));
}

void cuda_split_cross_entropy_backward(
    int dtype, int64_t rows, int64_t classes, int64_t row_stride, uintptr_t grad_head,
    uintptr_t grad_tail, uintptr_t logits, uintptr_t targets, uintptr_t lse, uintptr_t b,
    uintptr_t plain, uintptr_t sharp, uintptr_t class_weight, uintptr_t weight_sum,
    double label_smoothing, int64_t ignore_index, uintptr_t grad_logits, int device,
    uintptr_t stream) {
  const auto settings =
      checked("split_cross_entropy_backward", dtype, rows, classes, row_stride, label_smoothing,
              ignore_index,
              {{"logits", logits}, {"targets", targets}, {"lse", lse}, {"b", b},
               {"plain", plain}, {"sharp", sharp}, {"grad_logits", grad_logits}});
  cuda::split_cross_entropy_backward(
      (DType)dtype, settings, pointer(grad_head), pointer(grad_tail), pointer(logits),
      (const int64_t*)pointer(targets), pointer(lse), pointer(b),
      {pointer(plain), pointer(sharp), pointer(class_weight)}, (const double*)pointer(weight_sum),
      pointer(grad_logits), on(device, stream));
}

void define_cuda(py::module_& module) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.def("cuda_reason_unavailable", &cuda_reason_unavailable, release);
  module.def("cuda_squared_norm", &cuda_squared_norm, release);
  module.def("cuda_perturb_", &cuda_perturb_, release);
  module.def("cuda_sgd_update_", &cuda_sgd_update_, release);
  module.def("cuda_adam_update_", &cuda_adam_update_, release);
  module.def("cuda_merge_", &cuda_merge_, release);
  module.def("cuda_grad_check", &cuda_grad_check, release);
  module.def("cuda_split_cross_entropy", &cuda_split_cross_entropy, release);
  module.def("cuda_split_cross_entropy_backward", &cuda_split_cross_entropy_backward, release);
}

#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  const auto release = py::call_guard<py::gil_scoped_release>();
  module.doc() = "Compiled operations of imbsam_fast on raw pointers; see csrc/imbsam.h.";
  module.def("squared_norm", &squared_norm, release);
  module.def("perturb_", &perturb_, release);
  module.def("sgd_update_", &sgd_update_, release);
  module.def("adam_update_", &adam_update_, release);
  module.def("merge_", &merge_, release);
  module.def("grad_check", &grad_check, release);
  module.def("split_cross_entropy", &split_cross_entropy, release);
  module.def("split_cross_entropy_backward", &split_cross_entropy_backward, release);
  module.def("bandwidth", &bandwidth, release);
  module.def("isas", &isas, "The instruction sets of this build that run here, best last.");
  module.def("isa_in_use", &cpu::isa_in_use);
  module.def("use_isa", [](const std::string& name) { cpu::use_isa(name.c_str()); });
  module.def("has_openmp", &cpu::has_openmp);
  module.def("last_level_cache_bytes", &cpu::last_level_cache_bytes);
  module.def("connect", [](py::type tensor, py::type parameter) {
    return reader.connect(tensor.ptr(), parameter.ptr());
  });
  module.def("lists_match", &lists_match);
  module.def("pairs_match", &pairs_match);
  module.def("one_kind", &one_kind);
  module.def("cuda_tiles", &cuda_tiles);
#if defined(IMBSAM_CUDA)
  define_cuda(module);
  module.attr("has_cuda") = true;
#else
  module.attr("has_cuda") = false;
#endif
}
