// The optimizer's lists of tensors as Python holds them: gradients taken, state found, parameters
// sorted into buckets, and lists read once for the operations that get them.
//
// Where something here cannot be told (see tensors.h), a null object (None) is returned, nothing
// was changed, and Python takes a closer look.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "lists.h"
#include "tensors.h"

namespace imbsam {

namespace py = pybind11;

extern TensorReader reader;

// A list or a tuple, whose items can be looked at without asking Python.
class Items {
 public:
  explicit Items(py::handle sequence)
      : held_(py::reinterpret_steal<py::object>(PySequence_Fast(sequence.ptr(), "expected a list"))) {
    if (!held_) throw py::error_already_set();
  }
  size_t size() const { return (size_t)PySequence_Fast_GET_SIZE(held_.ptr()); }
  PyObject* operator[](size_t i) const { return PySequence_Fast_GET_ITEM(held_.ptr(), i); }

 private:
  py::object held_;
};

// A list that was read: to Python a sequence of its tensors, to the operations their addresses.
struct TensorList {
  py::object tensors;
  Pointers addresses;
  DType dtype;
  std::shared_ptr<const Sizes> numel;
};

inline DType dtype_of(const dlpack::Tensor& t) {
  constexpr uint8_t kBFloat = 4;
  if (t.dtype_bits == 16) return t.dtype_code == kBFloat ? DType::bfloat16 : DType::float16;
  return t.dtype_bits == 64 ? DType::float64 : DType::float32;
}

// The lists, read, where ops.check_lists would accept them.
inline py::object read_lists(const py::sequence& lists) {
  const Items all(lists);
  const size_t count = all.size() ? Items(all[0]).size() : 0;
  if (count == 0) return py::none();
  std::vector<dlpack::Tensor> first(count);
  auto numel = std::make_shared<Sizes>();
  py::list found(all.size());
  for (size_t l = 0; l < all.size(); ++l) {
    const Items list(all[l]);
    if (list.size() != count && list.size() != 0) return py::none();
    Pointers addresses;
    addresses.reserve(list.size());
    for (size_t i = 0; i < list.size(); ++i) {
      dlpack::Tensor t;
      if (!reader.read(list[i], &t)) return py::none();
      if (l == 0) {
        first[i] = t;
        if (!is_supported(t) || !is_dense(t) || !same_kind(t, first[0])) return py::none();
        numel->push_back(numel_of(t));
      } else if (!alike(t, first[i])) {
        return py::none();
      }
      addresses.push_back((uintptr_t)t.data + t.byte_offset);
    }
    found[l] = py::cast(TensorList{py::reinterpret_borrow<py::object>(all[l]),
                                   std::move(addresses), dtype_of(first[0]), numel});
  }
  return found;
}

// The gradients of `params`, None where there is none, which `params` then no longer have.
inline py::object take_gradients(const py::list& params) {
  const Items all(params);
  py::list found(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    dlpack::Tensor p, g;
    if (!reader.read(all[i], &p)) return py::none();
    auto gradient = py::reinterpret_steal<py::object>(reader.gradient(all[i]));
    if (!gradient) throw py::error_already_set();
    if (!gradient.is_none() && (!reader.read(gradient.ptr(), &g) || !alike(g, p)))
      return py::none();
    found[i] = std::move(gradient);
  }
  for (size_t i = 0; i < all.size(); ++i)
    if (!found[i].is_none() && !reader.forget_gradient(all[i])) throw py::error_already_set();
  return found;
}

// Whether each tensor, if there is one, is referred to by this list alone and alone on its memory.
inline bool all_alone(const py::list& tensors) {
  const Items items(tensors);
  for (size_t i = 0; i < items.size(); ++i)
    if (items[i] != Py_None && !reader.is_alone(items[i])) return false;
  return true;
}

// state[p][name] of each parameter with a tensor in `needed`; None where there is none.
inline py::object state_of(const py::dict& state, const py::list& params, const py::str& name,
                           const py::list& needed) {
  const Items all(params), needed_items(needed);
  if (needed_items.size() != all.size()) return py::none();
  py::list found(all.size());
  // The state is mostly in the order of the parameters; asking for one hashes it, in Python.
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *of_p = nullptr;
  bool in_order = true;
  for (size_t i = 0; i < all.size(); ++i) {
    found[i] = py::none();
    if (needed_items[i] == Py_None) continue;
    in_order = in_order && PyDict_Next(state.ptr(), &position, &key, &of_p) && key == all[i];
    if (!in_order) of_p = PyDict_GetItemWithError(state.ptr(), all[i]);
    if (PyErr_Occurred()) throw py::error_already_set();
    if (!of_p) continue;
    if (!PyDict_Check(of_p)) return py::none();
    PyObject* value = PyDict_GetItemWithError(of_p, name.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    if (!value || value == Py_None) continue;
    dlpack::Tensor p, t;
    if (!reader.read(all[i], &p) || !reader.read(value, &t) || !alike(t, p)) return py::none();
    found[i] = py::reinterpret_borrow<py::object>(value);
  }
  return found;
}

// Indices of the parameters with a tensor in the last of `lists`, by group, device and dtype, and
// by which of the lists have a tensor: (group, indices), the indices a range where they follow
// each other.
inline py::object partition(const py::list& groups, const py::list& params,
                            const py::sequence& lists) {
  typedef std::tuple<int, int, int, int, uint64_t> Kind;  // dtype, device, occupied lists
  const Items all(params);
  std::vector<Items> occupied;
  for (py::handle list : lists) occupied.emplace_back(list);
  if (occupied.empty() || occupied.size() > 64) return py::none();
  for (const Items& list : occupied)
    if (list.size() != all.size()) return py::none();
  py::list found;
  size_t i = 0;
  for (size_t group = 0; group < groups.size(); ++group) {
    std::vector<std::pair<Kind, std::vector<size_t>>> members;  // few kinds, in order of arrival
    for (const size_t end = i + py::cast<size_t>(groups[group]); i < end; ++i) {
      if (i >= all.size()) return py::none();
      dlpack::Tensor t;
      if (occupied.back()[i] == Py_None) continue;
      if (!reader.read(all[i], &t)) return py::none();
      uint64_t present = 0;
      for (size_t l = 0; l < occupied.size(); ++l)
        present |= (uint64_t)(occupied[l][i] != Py_None) << l;
      const Kind kind(t.dtype_code, t.dtype_bits, t.device_type, t.device_index, present);
      size_t k = 0;
      while (k < members.size() && members[k].first != kind) ++k;
      if (k == members.size()) members.emplace_back(kind, std::vector<size_t>());
      members[k].second.push_back(i);
    }
    for (const auto& [kind, indices] : members) {
      const size_t begin = indices.front(), end = indices.back() + 1;
      const bool is_range = end - begin == indices.size();
      py::object which = is_range ? py::handle((PyObject*)&PyRange_Type)(begin, end)
                                  : py::object(py::cast(indices));
      found.append(py::make_tuple(group, which));
    }
  }
  if (i != all.size()) return py::none();
  return found;
}

// Whether all entries are tensors (True), none is (False), or some are (None).
inline std::optional<bool> occupancy(const py::sequence& slots) {
  const Items items(slots);
  size_t tensors = 0;
  for (size_t i = 0; i < items.size(); ++i) tensors += items[i] != Py_None;
  if (tensors != 0 && tensors != items.size()) return std::nullopt;
  return tensors != 0;
}

}  // namespace imbsam
