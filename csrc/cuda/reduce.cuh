// Reductions over a block, in one fixed order.
#pragma once

namespace imbsam {
namespace cuda {

// op over the values of all threads; every thread gets the result. To be called by all threads of
// a block of whole warps.
template <class V, class Op>
__device__ __forceinline__ V block_reduce(V x, V identity, Op op) {
  __shared__ V of_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    x = op(x, __shfl_down_sync(0xffffffffu, x, distance));
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = lane < warps ? of_warp[lane] : identity;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      x = op(x, __shfl_down_sync(0xffffffffu, x, distance));
    if (lane == 0) of_warp[0] = x;
  }
  __syncthreads();
  x = of_warp[0];
  __syncthreads();  // of_warp may be written again
  return x;
}

__device__ __forceinline__ double block_sum(double x) {
  return block_reduce(x, 0.0, [](double a, double b) { return a + b; });
}

}  // namespace cuda
}  // namespace imbsam
