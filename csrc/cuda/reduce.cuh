// Reductions over a block, in one fixed order, and what one of its threads computes for all.
#pragma once

namespace imbsam {
namespace cuda {

// op over the values of all threads; every thread gets the result. To be called by all threads of
// a block of whole warps, at most kMostThreads.
template <int kMostThreads, class V, class Op>
__device__ __forceinline__ V block_reduce(V x, V identity, Op op) {
  constexpr int kMostWarps = kMostThreads / 32;
  __shared__ V of_warp[kMostWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    x = op(x, __shfl_down_sync(0xffffffffu, x, distance));
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = lane < warps ? of_warp[lane] : identity;
#pragma unroll
    for (int distance = kMostWarps / 2; distance > 0; distance /= 2)
      x = op(x, __shfl_down_sync(0xffffffffu, x, distance));
    if (lane == 0) of_warp[0] = x;
  }
  __syncthreads();
  x = of_warp[0];
  __syncthreads();  // of_warp may be written again
  return x;
}

template <int kMostThreads>
__device__ __forceinline__ double block_sum(double x) {
  return block_reduce<kMostThreads>(x, 0.0, [](double a, double b) { return a + b; });
}

// The sums of n numbers over all threads, for thread 0 alone and with one barrier. To be called at
// most once in a kernel, by all threads of a block of whole warps, at most kMostThreads.
template <int kMostThreads, int n>
__device__ __forceinline__ void sum_for_first_thread(double (&x)[n]) {
  constexpr int kMostWarps = kMostThreads / 32;
  __shared__ double of_warp[n][kMostWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const auto sum_lanes = [&](int most) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < n; ++i)
        if (distance < most) x[i] += __shfl_down_sync(0xffffffffu, x[i], distance);
  };
  sum_lanes(32);
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (lane == 0) of_warp[i][warp] = x[i];
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = lane < warps ? of_warp[i][lane] : 0.0;
  sum_lanes(kMostWarps);
}

// What one thread computes for its block, anew where the key is another one than before. To be
// called by all threads of a block with the same key.
template <class V>
class OnceABlock {
 public:
  template <class F>
  __device__ __forceinline__ const V& operator()(float key, F compute) {
    __shared__ V computed;
    if (!known_ || key != key_) {
      __syncthreads();  // all have read the one before
      if (threadIdx.x == 0) computed = compute(key);
      __syncthreads();
      value_ = computed;
      known_ = true;
      key_ = key;
    }
    return value_;
  }

 private:
  V value_;
  float key_;
  bool known_ = false;
};

}  // namespace cuda
}  // namespace imbsam
