// One phase of the optimizer's step over all parameters: every tensor read and checked once, sorted
// into launches, and launched.
//
// Nothing is kept from step to step, so nothing can be out of date. Where something is out of the
// ordinary, nothing was written and there is no phase; Python takes the way through the operators,
// which says what is wrong, or that nothing is. No Python code runs here, and so no handler of a
// signal, between the first write and the note of it in `pending`.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "slots.h"

namespace imbsam {

// What runs on which device: threads for the CPU; on CUDA the device and its current stream.
struct Where {
  int threads;
  cuda::Stream stream;
};

// The tensors of one group, dtype and occupation of the lists.
struct Launch {
  size_t group;
  DType dtype;
  uint64_t present;  // a bit for each list
  std::vector<size_t> indices;
  Sizes numel;
  Pointers theta;
  std::vector<Pointers> lists;  // those of the phase, then those of the state; [] for an absent one
  Pointers step;
  Pointers master;
  std::vector<py::object> masters;  // whose addresses those are

  Table table() const { return {dtype, (int64_t)numel.size(), numel.data()}; }
  int64_t chunks() const {
    int64_t sum = 0;
    for (const int64_t n : numel) sum += (n + kChunk - 1) / kChunk;
    return sum;
  }
};

// What a phase finds in the base's state of a parameter, besides the lists that it gets.
struct Wanted {
  py::dict state;
  std::vector<py::str> names;
  std::vector<std::vector<bool>> of_group;  // which of them
  bool step = false;                        // one count of steps a parameter, on the CPU
  // {parameter: [version, version]} of half-precision ones when their master weights were last
  // written out; without it there are no master weights.
  std::optional<py::dict> versions = std::nullopt;
};

// Looks parameters up in a dictionary that mostly has their order: asking hashes them, in Python.
class InOrder {
 public:
  PyObject* find(PyObject* dict, PyObject* p) {
    PyObject *key = nullptr, *value = nullptr;
    in_order_ = in_order_ && PyDict_Next(dict, &position_, &key, &value) && key == p;
    if (!in_order_) value = PyDict_GetItemWithError(dict, p);
    if (PyErr_Occurred()) PyErr_Clear();
    return value;
  }

 private:
  Py_ssize_t position_ = 0;
  bool in_order_ = true;
};

class Phase {
 public:
  // Parameters with a tensor in the last list, which follow each other in groups of so many; without
  // one there may be none in the others. All lists but the last are the optimizer's alone, and the
  // last one too where `is_owned`: their memory cannot be anybody else's.
  static std::unique_ptr<Phase> read(const std::vector<size_t>& groups, const py::list& params,
                                     const std::vector<py::list>& lists, bool is_owned,
                                     const Wanted& wanted) {
    std::unique_ptr<Phase> phase(new Phase(lists));
    const Items all(params);
    std::vector<Items> slots(lists.begin(), lists.end());
    for (const Items& list : slots)
      if (list.size() != all.size()) return nullptr;
    size_t i = 0;
    for (size_t group = 0; group < groups.size(); ++group)
      for (const size_t end = i + groups[group]; i < end; ++i)
        if (i >= all.size() || !phase->add(group, i, all[i], slots, wanted)) return nullptr;
    if (i != all.size() || phase->launches_.empty()) return nullptr;
    if (!phase->is_disjoint(is_owned)) return nullptr;
    return phase;
  }

  // squared_norm and perturb_ of g_t, the only list: rho and adaptive of each group. The partial
  // sums, float64 that `empty` makes, are those of all launches. pending.saved becomes what holds the
  // unperturbed weights.
  void perturb(const std::vector<double>& rho, const std::vector<bool>& adaptive,
               const py::object& empty, const py::object& pending, const Where& where) {
    const int64_t count = chunks();
    bool is_adaptive = false;
    for (const Launch& x : launches_) is_adaptive = is_adaptive || adaptive.at(x.group);
    const py::object sums = empty(count);
    double* const partials = (double*)address_of(sums, "perturb");
    const py::list& g_t = lists_.back();
    py::list saved(g_t.size());
    for (size_t i = 0; i < saved.size(); ++i) saved[i] = py::none();
    py::list all_sums;
    all_sums.append(sums);
    pending.attr("saved") = saved;
    pending.attr("partials") = all_sums;
    pending.attr("is_adaptive") = is_adaptive;
    {
      py::gil_scoped_release release;
      double* next = partials;
      for (const Launch& x : launches_) {
        squared_norm(x, adaptive[x.group] ? in(x.theta) : nullptr, next, where);
        next += x.chunks();
      }
    }
    for (const Launch& x : launches_) {
      {
        py::gil_scoped_release release;
        perturb_(x, partials, count, rho.at(x.group), adaptive[x.group], where);
      }
      for (size_t k = 0; k < x.indices.size(); ++k)
        saved[x.indices[k]] = x.masters.empty() ? py::object(g_t[x.indices[k]]) : x.masters[k];
    }
    tell_torch();
  }

  // Whether the launches are those that sort by g_h and g_p alone would give, in the same order.
  bool is_sorted_by_gradients() const {
    for (size_t l = 0; l < launches_.size(); ++l) {
      const Launch& x = launches_[l];
      for (size_t k = l; k-- > 0 && launches_[k].group == x.group;)
        if (launches_[k].dtype == x.dtype && !((launches_[k].present ^ x.present) & kGradients))
          return false;
    }
    return true;
  }

  // Whether all launches compute in one dtype, which scalars on a device have.
  bool is_of_one_arithmetic() const {
    for (const Launch& x : launches_)
      if ((x.dtype == DType::float64) != (launches_[0].dtype == DType::float64)) return false;
    return true;
  }
  bool is_double() const { return launches_[0].dtype == DType::float64; }

  // grad_check of g_h + g_p, of all launches: the partial sums, which `empty` makes, and whether all
  // is finite; on CUDA it is written to found_inf.
  std::pair<py::object, bool> grad_check(const py::object& empty, const py::object& found_inf,
                                         const Where& where) {
    const py::object sums = empty(chunks());
    double* next = (double*)address_of(sums, "grad_check");
    float* const flag = found_inf.is_none() ? nullptr : (float*)address_of(found_inf, "grad_check");
    bool finite = true;
    {
      py::gil_scoped_release release;
      for (const Launch& x : launches_) {
        finite = grad_check(x, next, flag, where) && finite;
        next += x.chunks();
      }
    }
    return {sums, finite};
  }

  // The update of a base, from lists saved, g_h, g_p and the state's: its settings of each group.
  // pending.saved becomes None when all is written: no signal handler runs before that.
  void update(const std::string& op, const std::vector<double>& lr,
              const std::vector<std::vector<double>>& settings, const std::vector<bool>& maximize,
              double grad_scale, bool skip, const cuda::DeviceScalars& there,
              const py::object& pending, const Where& where) {
    const Base base = base_of(op);
    std::vector<UpdateSettings> of_step;
    std::vector<StepCounts> counts;
    for (const Launch& x : launches_) {
      of_step.push_back(checked(base, lr.at(x.group), settings.at(x.group), maximize.at(x.group),
                                grad_scale, skip));
      counts.emplace_back(base, x.step, std::max(step_dtype_, 0), x.numel.size());
    }
    {
      py::gil_scoped_release release;
      for (size_t l = 0; l < launches_.size(); ++l) {
        update_(base, launches_[l], counts[l], of_step[l], there, where);
        if (!skip) counts[l].advance();
      }
    }
    pending.attr("saved") = py::none();
    tell_torch();
    for (const auto& [p, note] : notes_) reader.note_version(p, note.ptr());
  }

 private:
  typedef std::pair<uintptr_t, uintptr_t> Block;  // begin, end
  static constexpr uint64_t kGradients = 6;       // bits of g_h and g_p in `present`

  explicit Phase(const std::vector<py::list>& lists) : lists_(lists) {}

  int64_t chunks() const {
    int64_t sum = 0;
    for (const Launch& x : launches_) sum += x.chunks();
    return sum;
  }

  static void* address_of(const py::object& made, const char* op) {
    dlpack::Tensor read;
    IMBSAM_CHECK(reader.read(made.ptr(), &read), op << ": what was made is no tensor");
    return (char*)read.data + read.byte_offset;
  }

  // Takes parameter i in; false where Python has to look.
  bool add(size_t group, size_t i, PyObject* p, const std::vector<Items>& slots,
           const Wanted& wanted) {
    const size_t lists = slots.size(), states = wanted.names.size();
    dlpack::Tensor theta, t;
    if (slots.back()[i] == Py_None) {
      for (const Items& list : slots)
        if (list[i] != Py_None) return false;
      return true;
    }
    if (!reader.read(p, &theta) || !is_supported(theta) || !is_dense(theta)) return false;
    if (launches_.empty()) first_ = theta;
    if (theta.device_type != first_.device_type || theta.device_index != first_.device_index)
      return false;
    const int64_t numel = numel_of(theta);
    const bool has_master = wanted.versions && theta.dtype_bits == 16;
    const dlpack::Tensor kept = has_master ? in_float32(theta) : theta;
    const auto read = [&](PyObject* tensor, const dlpack::Tensor& like, uintptr_t& address) {
      if (!reader.read(tensor, &t) || !alike(t, like)) return false;
      address = (uintptr_t)t.data + t.byte_offset;
      return address != 0 || numel == 0;
    };
    uint64_t present = 0;
    for (size_t l = has_master && lists > 1 ? 1 : 0; l < lists; ++l) {
      if (slots[l][i] == Py_None) continue;
      if (!read(slots[l][i], theta, addresses_[l])) return false;
      present |= (uint64_t)1 << l;
    }
    PyObject* of_p = nullptr;  // what the base keeps of it
    const auto finds_state = [&] {
      if (!of_p) of_p = in_state_.find(wanted.state.ptr(), p);
      return of_p && PyDict_Check(of_p);
    };
    for (size_t k = 0; k < states; ++k) {
      if (!wanted.of_group[group][k]) continue;
      if (!finds_state()) return false;
      PyObject* const value = PyDict_GetItemWithError(of_p, wanted.names[k].ptr());
      if (!value || !read(value, kept, addresses_[lists + k])) return PyErr_Clear(), false;
      present |= (uint64_t)1 << (lists + k);
      written_.append(value);
    }
    Launch& launch = launch_of(group, dtype_of(theta), present, lists + states);
    if (wanted.step && !(finds_state() && count(of_p, launch))) return false;
    if (has_master) {
      PyObject* const saved = lists > 1 && slots[0][i] != Py_None ? slots[0][i] : nullptr;
      if (!saved && !finds_state()) return false;
      PyObject* const note = in_versions_.find(wanted.versions->ptr(), p);
      PyObject* const master = saved ? saved : unchanged(p, of_p, note);
      launch.master.push_back(0);
      if (!note || !master || !read(master, kept, launch.master.back())) return false;
      launch.masters.push_back(py::reinterpret_borrow<py::object>(master));
      notes_.emplace_back(p, py::reinterpret_borrow<py::object>(note));
      if (lists > 1) written_.append(master);
    }
    launch.indices.push_back(i);
    launch.numel.push_back(numel);
    launch.theta.push_back((uintptr_t)theta.data + theta.byte_offset);
    for (size_t l = 0; l < lists + states; ++l)
      if (present >> l & 1) launch.lists[l].push_back(addresses_[l]);
    written_.append(p);
    const auto block = [&](std::vector<Block>& blocks, uintptr_t begin, const dlpack::Tensor& of) {
      if (numel) blocks.emplace_back(begin, begin + numel * (of.dtype_bits / 8));
    };
    block(lasting_, launch.theta.back(), theta);
    if (has_master) block(lasting_, launch.master.back(), kept);
    for (size_t k = 0; k < states; ++k)
      if (present >> (lists + k) & 1) block(lasting_, addresses_[lists + k], kept);
    block(passing_, addresses_[lists - 1], theta);
    return launch.theta.back() != 0 || numel == 0;
  }

  // The master weight among what the base keeps, null where somebody has written p since.
  static PyObject* unchanged(PyObject* p, PyObject* of_p, PyObject* note) {
    static PyObject* const name = PyUnicode_InternFromString("master_weight");
    PyObject* const master = PyDict_GetItemWithError(of_p, name);
    PyErr_Clear();
    return note && reader.has_version(p, note) ? master : nullptr;
  }

  // The count of steps, one number on the CPU and all of one dtype.
  bool count(PyObject* of_p, Launch& launch) {
    constexpr int kCpu = 1;
    static PyObject* const name = PyUnicode_InternFromString("step");
    PyObject* const value = PyDict_GetItemWithError(of_p, name);
    dlpack::Tensor t;
    if (!value || !reader.read(value, &t)) return PyErr_Clear(), false;
    if (numel_of(t) != 1 || t.device_type != kCpu || !is_supported(t) || t.dtype_bits < 32)
      return false;
    const int dtype = (int)dtype_of(t);
    if (step_dtype_ >= 0 && dtype != step_dtype_) return false;
    step_dtype_ = dtype;
    launch.step.push_back((uintptr_t)t.data + t.byte_offset);
    written_.append(value);
    return true;
  }

  Launch& launch_of(size_t group, DType dtype, uint64_t present, size_t lists) {
    for (auto x = launches_.rbegin(); x != launches_.rend() && x->group == group; ++x)
      if (x->dtype == dtype && x->present == present) return *x;
    launches_.push_back(
        {group, dtype, present, {}, {}, {}, std::vector<Pointers>(lists), {}, {}, {}});
    return launches_.back();
  }

  // Whether no two of what is written or read share memory.
  bool is_disjoint(bool is_owned) {
    // Step after step memory comes in one order, and looking is cheaper than sorting.
    thread_local std::map<std::pair<bool, size_t>, std::vector<uint32_t>> orders;
    if (orders.size() > 64) orders.clear();
    const auto& fixed = orders[{false, lasting_.size()}];
    if (!sorted(lasting_, orders[{false, lasting_.size()}])) return false;
    if (is_owned) return true;
    const auto& moving = orders[{true, passing_.size()}];
    if (!sorted(passing_, orders[{true, passing_.size()}])) return false;
    size_t a = 0, b = 0;
    while (a < fixed.size() && b < moving.size()) {
      const Block &x = lasting_[fixed[a]], &y = passing_[moving[b]];
      if (x.second > y.first && y.second > x.first) return false;
      x.first < y.first ? ++a : ++b;
    }
    return true;
  }

  // Puts the blocks in order; returns whether they are apart.
  static bool sorted(const std::vector<Block>& blocks, std::vector<uint32_t>& order) {
    const auto apart = [&] {
      for (size_t i = 1; i < order.size(); ++i)
        if (blocks[order[i - 1]].second > blocks[order[i]].first) return false;
      return true;
    };
    if (order.size() == blocks.size() && apart()) return true;
    order.resize(blocks.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](uint32_t a, uint32_t b) { return blocks[a].first < blocks[b].first; });
    return apart();
  }

  // Autograd's version counters, of what others may look at.
  void tell_torch() {
    if (!reader.increment_version(written_.ptr())) throw py::error_already_set();
  }

#if defined(IMBSAM_CUDA)
  static constexpr bool kCuda = true;
#else
  static constexpr bool kCuda = false;
#endif

  static void squared_norm(const Launch& x, const void* const* theta, double* partials,
                           const Where& where) {
    if constexpr (kCuda)
      if (where.threads == 0)
        return cuda::squared_norm(x.table(), in(x.lists[0]), theta, partials, where.stream);
    cpu::squared_norm(x.table(), in(x.lists[0]), theta, partials, where.threads);
  }

  static void perturb_(const Launch& x, const double* partials, int64_t count, double rho,
                       bool adaptive, const Where& where) {
    if constexpr (kCuda)
      if (where.threads == 0)
        return cuda::perturb_(x.table(), out(x.theta), out(x.lists[0]), in(x.master), nullptr,
                              partials, count, rho, adaptive, where.stream);
    cpu::perturb_(x.table(), out(x.theta), out(x.lists[0]), in(x.master), nullptr, partials, count,
                  rho, adaptive, where.threads);
  }

  static bool grad_check(const Launch& x, double* partials, float* found_inf, const Where& where) {
    if constexpr (kCuda)
      if (where.threads == 0)
        return cuda::grad_check(x.table(), in(x.lists[1]), in(x.lists[2]), partials, found_inf,
                                where.stream), true;
    return cpu::grad_check(x.table(), in(x.lists[1]), in(x.lists[2]), partials, where.threads);
  }

  static void update_(Base base, const Launch& x, const StepCounts& counts,
                      const UpdateSettings& settings, const cuda::DeviceScalars& there,
                      const Where& where) {
    UpdateLists lists = {out(x.theta),    in(x.lists[0]), in(x.lists[1]),
                         in(x.lists[2]), {},             out(x.master)};
    for (int k = 0; k < entry(base).state_count; ++k) lists.state[k] = out(x.lists[3 + k]);
    if constexpr (kCuda)
      if (where.threads == 0)
        return cuda::update_(base, x.table(), lists, nullptr, settings, there, where.stream);
    cpu::update_(base, x.table(), lists, counts.next(), settings, where.threads);
  }

  std::vector<Launch> launches_;
  std::vector<py::list> lists_;
  py::list written_;
  std::vector<std::pair<PyObject*, py::object>> notes_;  // of parameters with a master weight
  std::vector<Block> lasting_, passing_;
  dlpack::Tensor first_ = {};
  uintptr_t addresses_[8] = {};
  InOrder in_state_, in_versions_;
  int step_dtype_ = -1;
};

}  // namespace imbsam
