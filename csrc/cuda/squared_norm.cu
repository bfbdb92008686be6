// squared_norm and grad_check: one block sums one chunk, in double and in a fixed order.

#include "launch.h"
#include "multi_tensor.cuh"
#include "reduce.cuh"

namespace imbsam {
namespace cuda {
namespace {

constexpr int kSumThreads = 512;
constexpr int kSumUnroll = 4;  // packs that a thread has under way; there is little else to wait for

// bytes: 1n read (2n with theta). Lists: g_t, theta.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    squared_norm_kernel(const __grid_constant__ TensorTable<2> table, double* partials) {
  constexpr int lanes = Pack<T>::kLanes;
  const Span<T, 2> chunk(table, blockIdx.x, kChunk);
  const T *g_t = chunk.data[0], *theta = chunk.data[1];
  double sums[lanes] = {};
  if (theta) {
    for_each_pack<T, kSumThreads, kSumUnroll>(chunk.elements, chunk.aligned, [&](int e, auto access) {
      const Pack<T> g = access.load(g_t + e), t = access.load(theta + e);
#pragma unroll
      for (int j = 0; j < lanes; ++j) {
        const double x = (double)widened(t.lanes[j]) * (double)widened(g.lanes[j]);
        sums[j] += x * x;
      }
    });
  } else {
    for_each_pack<T, kSumThreads, kSumUnroll>(chunk.elements, chunk.aligned, [&](int e, auto access) {
      const Pack<T> g = access.load(g_t + e);
#pragma unroll
      for (int j = 0; j < lanes; ++j) {
        const double x = widened(g.lanes[j]);
        sums[j] += x * x;
      }
    });
  }
#pragma unroll
  for (int j = 1; j < lanes; ++j) sums[0] += sums[j];
  const double sum = block_sum(sums[0]);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// bytes: 2n read. Lists: g_h, g_p. Every block that finds a number that is not finite writes the
// same 1 to *found_inf.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    grad_check_kernel(const __grid_constant__ TensorTable<2> table, double* partials,
                      float* found_inf) {
  typedef typename Arithmetic<T>::S S;
  constexpr int lanes = Pack<T>::kLanes;
  const Span<T, 2> chunk(table, blockIdx.x, kChunk);
  const T *g_h = chunk.data[0], *g_p = chunk.data[1];
  double sums[lanes] = {};
  bool finite = true;
  for_each_pack<T, kSumThreads, kSumUnroll>(chunk.elements, chunk.aligned, [&](int e, auto access) {
    Pack<T> h = {};
    if (g_h) h = access.load(g_h + e);
    const Pack<T> p = access.load(g_p + e);
#pragma unroll
    for (int j = 0; j < lanes; ++j) {
      const S x = g_h ? widened(h.lanes[j]) + widened(p.lanes[j]) : widened(p.lanes[j]);
      finite = finite && isfinite(x);
      sums[j] += (double)x * (double)x;
    }
  });
#pragma unroll
  for (int j = 1; j < lanes; ++j) sums[0] += sums[j];
  const double sum = block_sum(sums[0]);
  const bool found = __syncthreads_or(!finite);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
    if (found) *found_inf = 1;
  }
}

// Launches a kernel with one block a chunk.
template <class Kernel, class... Arguments>
void launch_over_chunks(const char* op, Kernel* kernel, const Table& tensors,
                        const void* const* const (&lists)[2], double* partials,
                        const Stream& stream, const Arguments&... arguments) {
  const OnDevice on_device(op, stream.device);
  TensorTable<2> table;
  for (const Batch& batch : batches(tensors, TensorTable<2>::kCapacity, kChunk)) {
    fill(table, batch, tensors, lists, kChunk);
    launch(op, kernel, batch.tiles, kSumThreads, stream, table, partials + batch.first_tile,
           arguments...);
  }
}

}  // namespace

void squared_norm(const Table& tensors, const void* const* g_t, const void* const* theta,
                  double* partials, const Stream& stream) {
  with_type(tensors.dtype, [&](auto type) {
    launch_over_chunks("squared_norm", squared_norm_kernel<typename decltype(type)::T>, tensors,
                       {g_t, theta}, partials, stream);
  });
}

void grad_check(const Table& tensors, const void* const* g_h, const void* const* g_p,
                double* partials, float* found_inf, const Stream& stream) {
  with_type(tensors.dtype, [&](auto type) {
    launch_over_chunks("grad_check", grad_check_kernel<typename decltype(type)::T>, tensors,
                       {g_h, g_p}, partials, stream, found_inf);
  });
}

}  // namespace cuda
}  // namespace imbsam
