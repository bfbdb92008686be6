// Stands in for CUDA's runtime, so that csrc/cuda/ compiles for the CPU as it is. Blocks run one
// after the other, the threads of a block as fibers that take turns at barriers.
#pragma once

#include <driver_types.h>
#include <math.h>
#include <vector_types.h>

#include <functional>
#include <tuple>
#include <utility>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define CUDART_VERSION 12010

namespace on_host {

extern uint3 thread, block, block_size, grid_size;
extern double exchanged[1024];
extern int any;

void block_barrier();
void warp_barrier();
void run_block(int threads, const std::function<void()>& kernel);

template <class... A, size_t... I>
void run_grid(void (*kernel)(A...), dim3 blocks, dim3 threads, void** arguments,
              std::index_sequence<I...>) {
  grid_size.x = blocks.x;
  for (block.x = 0; block.x < blocks.x; ++block.x)
    run_block(threads.x, [&] { kernel(*static_cast<A*>(arguments[I])...); });
}

}  // namespace on_host

#define threadIdx on_host::thread
#define blockIdx on_host::block
#define blockDim on_host::block_size
#define gridDim on_host::grid_size

inline void __syncthreads() { on_host::block_barrier(); }

inline int __syncthreads_or(int mine) {
  if (threadIdx.x == 0) on_host::any = 0;
  __syncthreads();
  if (mine) on_host::any = 1;
  __syncthreads();
  const int found = on_host::any;
  __syncthreads();
  return found;
}

template <class V>
V __shfl_down_sync(unsigned, V mine, int distance) {
  on_host::exchanged[threadIdx.x] = mine;
  on_host::warp_barrier();
  const bool inside = threadIdx.x % 32 + distance < 32;
  const V other = inside ? (V)on_host::exchanged[threadIdx.x + distance] : mine;
  on_host::warp_barrier();
  return other;
}

using std::isfinite;

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaErrorInvalidDevice; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}

// Three blocks at once, so that each has several tiles.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : 0, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
template <class... A>
cudaError_t cudaLaunchKernel(void (*kernel)(A...), dim3 blocks, dim3 threads, void** arguments,
                             size_t, cudaStream_t) {
  on_host::run_grid(kernel, blocks, threads, arguments, std::index_sequence_for<A...>());
  return cudaSuccess;
}
