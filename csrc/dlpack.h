// The part of DLPack's C exchange interface (version 1) that reads a tensor: how bindings.cpp
// sees the address and layout of a torch tensor without a torch header. torch 2.10 and newer
// offer it as torch.Tensor.__dlpack_c_exchange_api__.
// Binary layout: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once

#include <stdint.h>

namespace imbsam {
namespace dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t ndim;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  const int64_t *shape, *strides;  // strides in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* unused[3];  // that make or hand over tensors
  int (*tensor_from_python)(void* object, Tensor* out);  // borrows; not 0: a Python error is set
  void* current_work_stream;
};

constexpr uint32_t kMajor = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

}  // namespace dlpack
}  // namespace imbsam
