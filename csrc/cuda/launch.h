// The host's side of a launch: errors, the device, the grid, the dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "tiles.h"

namespace imbsam {
namespace cuda {

inline void check(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here; the next call shall not report it again
  throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
}

// Makes a device current, and the previous one again at the end of the scope.
class OnDevice {
 public:
  OnDevice(const char* op, int device) : device_(device) {
    check(op, cudaGetDevice(&previous_));
    if (previous_ != device_) check(op, cudaSetDevice(device_));
  }
  ~OnDevice() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int previous_, device_;
};

template <class A>
struct Exactly {
  typedef A type;
};

// The device that the stream belongs to must be current.
template <class... Arguments>
void launch(const char* op, void (*kernel)(Arguments...), int blocks, int threads,
            const Stream& stream, const typename Exactly<Arguments>::type&... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(op, cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), addresses, 0,
                             static_cast<cudaStream_t>(stream.handle)));
}

// As many blocks as the device runs at once, for kernels whose blocks take turns over the tiles.
template <class Kernel>
int resident_blocks(const char* op, Kernel* kernel, int threads, const Stream& stream) {
  int multiprocessors = 0, blocks = 0;
  check(op, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                   stream.device));
  check(op, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
  return std::max(1, multiprocessors * blocks);
}

template <class Element>
struct Type {
  typedef Element T;
};

// Calls f(Type<T>()) with the element type of the dtype.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(Type<float>());
    case DType::float64: return f(Type<double>());
    case DType::bfloat16: return f(Type<__nv_bfloat16>());
    case DType::float16: return f(Type<__half>());
  }
}

// Calls f(Type<T>(), bool constant) with whether there are master weights, which only data of two
// bytes may have.
template <class F>
void with_type_and_master(DType dtype, bool has_master, F f) {
  with_type(dtype, [&](auto type) {
    if constexpr (sizeof(typename decltype(type)::T) == 2)
      if (has_master) return f(type, std::true_type());
    f(type, std::false_type());
  });
}

// Launches an elementwise kernel over all tensors, in as many launches as their table takes.
template <int kLists, class Kernel, class... Arguments>
void launch_over_tiles(const char* op, Kernel* kernel, int threads, int tile, bool reverse,
                       const Table& tensors, const void* const* const (&lists)[kLists],
                       const Stream& stream, const Arguments&... arguments) {
  const OnDevice on_device(op, stream.device);
  std::vector<Batch> all = batches(tensors, TensorTable<kLists>::kCapacity, tile);
  if (all.empty()) return;
  if (reverse) std::reverse(all.begin(), all.end());
  const int resident = resident_blocks(op, kernel, threads, stream);
  TensorTable<kLists> table;
  for (const Batch& batch : all) {
    fill(table, batch, tensors, lists, tile);
    launch(op, kernel, std::min(batch.tiles, resident), threads, stream, table, arguments...);
  }
}

}  // namespace cuda
}  // namespace imbsam
