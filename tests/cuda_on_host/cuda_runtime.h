// Stands in for CUDA's runtime, so that csrc/cuda/ compiles for the CPU as it is. Blocks run one
// after the other, the threads of a block as fibers that take turns at barriers. What runs is the
// kernel's source, or what nvcc made of it where its PTX was loaded (translate.py).
#pragma once

#include <driver_types.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
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
extern double exchanged[2][1024];
extern unsigned turns[1024];
extern int any;
extern bool noting;

// One kernel of a library that translate.py wrote.
struct PtxKernel {
  const char* key;
  void (*run)(char* parameters);
  int parameter_bytes, shared_bytes;
};

void block_barrier();
void warp_barrier();
void run_block(int threads, const std::function<void()>& kernel);
void note(int instruction, uintptr_t address, unsigned size);

// What runs in place of a kernel; null: its source.
const PtxKernel* in_place_of(const void* kernel);

template <class... A, size_t... I>
void run_grid(void (*kernel)(A...), dim3 blocks, dim3 threads, void** arguments,
              std::index_sequence<I...>) {
  alignas(16) char parameters[65536];
  size_t used = 0;
  const auto pack = [&](const void* argument, size_t size, size_t alignment) {
    used = (used + alignment - 1) / alignment * alignment;
    memcpy(parameters + used, argument, size);
    used += size;
  };
  (pack(arguments[I], sizeof(A), alignof(A)), ...);
  const PtxKernel* ptx = in_place_of((const void*)kernel);
  if (ptx && used != (size_t)ptx->parameter_bytes) __builtin_trap();
  grid_size.x = blocks.x;
  for (block.x = 0; block.x < blocks.x; ++block.x)
    run_block(threads.x, [&] {
      if (ptx)
        ptx->run(parameters);
      else
        kernel(*static_cast<A*>(arguments[I])...);
    });
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

// The value of the thread `from`; the own one from outside of the warp. Turns alternate between
// two places, so that nobody overwrites what another has yet to read.
template <class V>
V exchange(V mine, unsigned from) {
  double* place = on_host::exchanged[on_host::turns[threadIdx.x]++ % 2];
  memcpy(&place[threadIdx.x], &mine, sizeof(V));
  on_host::warp_barrier();
  V other = mine;
  if (from / 32 == threadIdx.x / 32) memcpy(&other, &place[from], sizeof(V));
  return other;
}

template <class V>
V __shfl_down_sync(unsigned, V mine, int distance) {
  return exchange(mine, threadIdx.x + distance);
}
template <class V>
V __shfl_xor_sync(unsigned, V mine, int mask) {
  return exchange(mine, threadIdx.x ^ mask);
}

// Rounded one by one, as all arithmetic here: the host compiles without contraction.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) >> shift % 32);
}

// ex2.approx.ftz: off by up to one ulp, in a way that looks random.
inline float exp2_approx(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof(word));
  const double error = ((int32_t)(word * 2654435761u) / 2147483648.0) * 0x1p-23;
  const float value = (float)(exp2((double)x) * (1 + error));
  return value < 0x1p-126f ? 0.0f : value;
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
