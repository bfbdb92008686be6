// Torch tensors as Python hands them over: their addresses and layouts, without a torch header.
//
// Only exact torch.Tensor and torch.nn.Parameter objects are read. Whatever else arrives (a
// subclass, a traced tensor, another type) and every torch older than 2.10 takes the slower way
// through Python, in imbsam_fast/ops/operators.py and native.py.
#pragma once

#include <Python.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "imbsam.h"

namespace imbsam {

class TensorReader {
 public:
  // Returns whether this torch offers the exchange interface.
  bool connect(PyObject* tensor_type, PyObject* parameter_type) {
    PyObject* capsule = PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__");
    void* api = capsule ? PyCapsule_GetPointer(capsule, dlpack::kCapsule) : nullptr;
    Py_XDECREF(capsule);
    PyErr_Clear();
    api_ = (const dlpack::ExchangeApi*)api;
    if (!api_ || api_->major != dlpack::kMajor || !api_->tensor_from_python) api_ = nullptr;
    tensor_type_ = tensor_type;  // both live as long as the process
    parameter_type_ = parameter_type;
    grad_ = PyObject_GetAttrString(tensor_type, "grad");  // the property, kept for ever
    if (!grad_ || !Py_TYPE(grad_)->tp_descr_get || !Py_TYPE(grad_)->tp_descr_set) api_ = nullptr;
    version_ = PyObject_GetAttrString(tensor_type, "_version");  // likewise
    if (!version_ || !Py_TYPE(version_)->tp_descr_get) api_ = nullptr;
    PyErr_Clear();
    PyObject* const torch_c = PyImport_ImportModule("torch._C");
    PyObject* const storage_type = torch_c ? PyObject_GetAttrString(torch_c, "StorageBase") : nullptr;
    // Kept for ever too; null where a torch lacks one.
    storage_ = PyObject_GetAttrString(tensor_type, "untyped_storage");
    increment_version_ = torch_c ? PyObject_GetAttrString(torch_c, "_increment_version") : nullptr;
    uses_ = torch_c ? PyObject_GetAttrString(torch_c, "_storage_Use_Count") : nullptr;
    address_ = storage_type ? PyObject_GetAttrString(storage_type, "_cdata") : nullptr;
    resizable_ = storage_type ? PyObject_GetAttrString(storage_type, "resizable") : nullptr;
    if (!increment_version_) api_ = nullptr;
    Py_XDECREF(storage_type);
    Py_XDECREF(torch_c);
    PyErr_Clear();
    return api_ != nullptr;
  }

  // Whether it is exactly a tensor or a parameter, no subclass of them.
  bool is_plain(const PyObject* object) const {
    const PyObject* type = (const PyObject*)Py_TYPE(object);
    return type == tensor_type_ || type == parameter_type_;
  }

  // False where the object cannot be read; no Python error stays set.
  bool read(PyObject* object, dlpack::Tensor* tensor) const {
    if (!api_ || !is_plain(object)) return false;
    if (api_->tensor_from_python(object, tensor) == 0) return true;
    PyErr_Clear();
    return false;
  }

  // tensor.grad of a tensor that could be read: a new reference, None where there is none, or null
  // with a Python error. And tensor.grad = None, which returns whether it worked.
  PyObject* gradient(PyObject* tensor) const {
    return Py_TYPE(grad_)->tp_descr_get(grad_, tensor, (PyObject*)Py_TYPE(tensor));
  }
  bool forget_gradient(PyObject* tensor) const {
    return Py_TYPE(grad_)->tp_descr_set(grad_, tensor, Py_None) == 0;
  }

  // Counts a write of each tensor for autograd; false: a Python error is set.
  bool increment_version(PyObject* tensors) const {
    PyObject* const none = PyObject_CallFunctionObjArgs(increment_version_, tensors, nullptr);
    Py_XDECREF(none);
    return none != nullptr;
  }

  // Whether `note` is [version, version] of a tensor that could be read, and making it so; no Python
  // error stays set.
  bool has_version(PyObject* tensor, PyObject* note) const {
    if (!PyList_Check(note) || PyList_GET_SIZE(note) != 2) return false;
    PyObject* const version = version_of(tensor);
    bool same = version != nullptr;
    for (Py_ssize_t i = 0; i < 2; ++i)
      same = same && PyObject_RichCompareBool(PyList_GET_ITEM(note, i), version, Py_EQ) == 1;
    Py_XDECREF(version);
    PyErr_Clear();
    return same;
  }
  void note_version(PyObject* tensor, PyObject* note) const {
    PyObject* const version = version_of(tensor);
    for (Py_ssize_t i = 0; version && i < PyList_GET_SIZE(note); ++i) {
      Py_INCREF(version);
      PyList_SetItem(note, i, version);
    }
    Py_XDECREF(version);
    PyErr_Clear();
  }

  // Whether this is the only tensor on its memory, which torch's allocator gave it, and nobody
  // refers to it but the caller, once. False where that cannot be told.
  bool is_alone(PyObject* tensor) const {
    if ((const PyObject*)Py_TYPE(tensor) != tensor_type_ || Py_REFCNT(tensor) != 1) return false;
    if (!storage_ || !uses_ || !address_ || !resizable_) return false;
    constexpr long kUses = 2;  // the tensor's and that of the object made here
    PyObject* const storage = PyObject_CallFunctionObjArgs(storage_, tensor, nullptr);
    PyObject *resizable = nullptr, *address = nullptr, *uses = nullptr;
    if (storage) resizable = PyObject_CallFunctionObjArgs(resizable_, storage, nullptr);
    if (resizable) address = Py_TYPE(address_)->tp_descr_get(address_, storage, (PyObject*)Py_TYPE(storage));
    if (address) uses = PyObject_CallFunctionObjArgs(uses_, address, nullptr);
    const bool alone = uses && resizable == Py_True && PyLong_AsLong(uses) == kUses;
    for (PyObject* object : {uses, address, resizable, storage}) Py_XDECREF(object);
    PyErr_Clear();
    return alone;
  }

 private:
  PyObject* version_of(PyObject* tensor) const {
    return Py_TYPE(version_)->tp_descr_get(version_, tensor, (PyObject*)Py_TYPE(tensor));
  }

  const dlpack::ExchangeApi* api_ = nullptr;
  PyObject *grad_ = nullptr, *version_ = nullptr;
  PyObject *storage_ = nullptr, *uses_ = nullptr, *address_ = nullptr, *resizable_ = nullptr;
  PyObject* increment_version_ = nullptr;
  const PyObject *tensor_type_ = nullptr, *parameter_type_ = nullptr;
};

inline bool is_supported(const dlpack::Tensor& t) {
  constexpr uint8_t kFloat = 2, kBFloat = 4;
  const bool float_ = t.dtype_code == kFloat &&
                      (t.dtype_bits == 16 || t.dtype_bits == 32 || t.dtype_bits == 64);
  return t.dtype_lanes == 1 && (float_ || (t.dtype_code == kBFloat && t.dtype_bits == 16));
}

// How a tensor is laid out in float32 beside one of another dtype.
inline dlpack::Tensor in_float32(dlpack::Tensor t) {
  t.dtype_code = 2;  // a float
  t.dtype_bits = 32;
  return t;
}

inline bool same_kind(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.dtype_code == b.dtype_code && a.dtype_bits == b.dtype_bits &&
         a.device_type == b.device_type && a.device_index == b.device_index;
}

// Whether two tensors agree in dtype, device and shape and order their elements alike.
inline bool alike(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  if (!same_kind(a, b) || a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.shape[i] != b.shape[i] || (a.shape[i] > 1 && a.strides[i] != b.strides[i])) return false;
  return true;
}

inline int64_t numel_of(const dlpack::Tensor& t) {
  int64_t numel = 1;
  for (int i = 0; i < t.ndim; ++i) numel *= t.shape[i];
  return numel;
}

inline bool is_contiguous(const dlpack::Tensor& t) {
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] > 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

// Whether the elements fill one block of memory without overlap.
inline bool is_dense(const dlpack::Tensor& t) {
  if (is_contiguous(t)) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] == 0) return true;
    if (t.shape[i] > 1) dims.emplace_back(t.strides[i], t.shape[i]);
  }
  if (!std::is_sorted(dims.begin(), dims.end())) std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

}  // namespace imbsam
