// squared_norm and grad_check: one block sums one chunk, in double and in a fixed order.

#include "launch.h"
#include "multi_tensor.cuh"
#include "reduce.cuh"

namespace imbsam {
namespace cuda {
namespace {

constexpr int kSumThreads = 512;
constexpr int kSumUnroll = 4;  // packs that a thread has under way; there is little else to wait for

// The sum of the squares of n floats in float, as good as in float64 where it `fits`.
//
// A number x is whole + rest, rest 0 but for products of two. Its square is h + l, h = fl(whole^2)
// and l = fma(whole, whole, -h), without error. The h are added in a tree; each a + b has its
// rounding error e, without error too (Knuth). The l and e are added as they are. With u = 2^-24
// and s the sum of the squares: |l| <= u h (3 u h, and 4 u^2 h off, with a rest), and the e of a
// level of the tree sum to at most u s: l and e sum to at most 5 u s for n = 4, and 4 u s for n = 8.
// A term of it is rounded at most 6 times in the tree, and 16 times where a thread adds up `low` of
// its packs: all that is off is less than 110 u^2 s, 2^-41 s. Every square is positive, so that the
// same relative bound holds for partial sums. What underflows is off by at most 2^-149 a term, less
// than 2^-48 s where s is 2^-96 or more; what overflows makes `high` infinite.
template <int n>
struct PairSum {
  float high, low;
  bool fits;

  template <bool kRest>
  static __device__ __forceinline__ PairSum of(const float (&whole)[n], const float (&rest)[n]) {
    float h[n], l[n];
    bool zero = !kRest;  // a product may be 0 for its underflow
#pragma unroll
    for (int j = 0; j < n; ++j) {
      h[j] = __fmul_rn(whole[j], whole[j]);
      l[j] = __fmaf_rn(whole[j], whole[j], -h[j]);
      if (kRest) l[j] = __fmaf_rn(__fadd_rn(whole[j], whole[j]), rest[j], l[j]);
      zero = zero && whole[j] == 0;
    }
#pragma unroll
    for (int width = n / 2; width > 0; width /= 2) {
#pragma unroll
      for (int j = 0; j < width; ++j) {
        const float a = h[j], b = h[j + width], s = __fadd_rn(a, b), of_b = __fsub_rn(s, a);
        const float e = __fadd_rn(__fsub_rn(a, __fsub_rn(s, of_b)), __fsub_rn(b, of_b));
        h[j] = s;
        l[j] = __fadd_rn(__fadd_rn(l[j], l[j + width]), e);
      }
    }
    return {h[0], l[0], zero || (h[0] >= 0x1p-96f && h[0] <= 0x1p126f)};
  }
};

// What is squared: numbers as floats, whole + rest, and in float64.
template <class T>
struct Gradients {
  static constexpr bool kRest = false;
  static constexpr int kLanes = Pack<T>::kLanes;
  const T* g_t;

  template <class Access, class S>
  __device__ __forceinline__ void read(int e, Access access, S (&x)[kLanes]) const {
    const Pack<T> g = access.load(g_t + e);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) x[j] = widened(g.lanes[j]);
  }
  template <class Access>
  __device__ __forceinline__ void read(int e, Access access, float (&whole)[kLanes],
                                       float (&)[kLanes]) const {
    read(e, access, whole);
  }
};

template <class T>
struct Products {
  static constexpr bool kRest = true;
  static constexpr int kLanes = Pack<T>::kLanes;
  const T *g_t, *theta;

  template <class Access>
  __device__ __forceinline__ void read(int e, Access access, double (&x)[kLanes]) const {
    const Pack<T> g = access.load(g_t + e), t = access.load(theta + e);
#pragma unroll
    for (int j = 0; j < kLanes; ++j)
      x[j] = (double)widened(t.lanes[j]) * (double)widened(g.lanes[j]);
  }
  template <class Access>
  __device__ __forceinline__ void read(int e, Access access, float (&whole)[kLanes],
                                       float (&rest)[kLanes]) const {
    const Pack<T> g = access.load(g_t + e), t = access.load(theta + e);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) {
      const float a = widened(t.lanes[j]), b = widened(g.lanes[j]);
      whole[j] = __fmul_rn(a, b);
      rest[j] = __fmaf_rn(a, b, -whole[j]);
    }
  }
};

// g_h + g_p, rounded to the arithmetic dtype.
template <class T>
struct SumsOfGradients {
  static constexpr bool kRest = false;
  static constexpr int kLanes = Pack<T>::kLanes;
  const T *g_h, *g_p;

  template <class Access, class S>
  __device__ __forceinline__ void read(int e, Access access, S (&x)[kLanes]) const {
    Pack<T> h = {};
    if (g_h) h = access.load(g_h + e);
    const Pack<T> p = access.load(g_p + e);
#pragma unroll
    for (int j = 0; j < kLanes; ++j)
      x[j] = g_h ? widened(h.lanes[j]) + widened(p.lanes[j]) : widened(p.lanes[j]);
  }
  template <class Access>
  __device__ __forceinline__ void read(int e, Access access, float (&whole)[kLanes],
                                       float (&)[kLanes]) const {
    read(e, access, whole);
  }
};

// The sum of a thread's squares in a chunk, in one order. Floats take one addition in float64 a
// pack, of which many GPUs do 2 a clock and multiprocessor; packs that do not fit are read again.
template <class T>
struct SquareSum {
  double sum = 0;
  bool finite = true;

  template <class Numbers>
  __device__ __forceinline__ void add(const Span<T, 2>& chunk, const Numbers& numbers) {
    if constexpr (sizeof(T) == 8) {
      for_each_pack_in_order<T, kSumThreads, kSumUnroll>(
          chunk.elements, chunk.aligned,
          [&](int e, auto access) { add_in_double(e, access, numbers); });
      return;
    }
    float low = 0;
    bool all_fit = true;
    for_each_pack_in_order<T, kSumThreads, kSumUnroll>(
        chunk.elements, chunk.aligned, [&](int e, auto access) {
          const PairSum<Numbers::kLanes> pack = pair_sum(e, access, numbers);
          all_fit = all_fit && pack.fits;
          sum += (double)(pack.fits ? pack.high : 0.0f);
          low = __fadd_rn(low, pack.fits ? pack.low : 0.0f);
        });
    sum += (double)low;
    if (all_fit) return;
    for_each_pack_in_order<T, kSumThreads, 1>(
        chunk.elements, chunk.aligned, [&](int e, auto access) {
          if (!pair_sum(e, access, numbers).fits) add_in_double(e, access, numbers);
        });
  }

 private:
  template <class Access, class Numbers>
  static __device__ __forceinline__ PairSum<Numbers::kLanes> pair_sum(int e, Access access,
                                                                      const Numbers& numbers) {
    float whole[Numbers::kLanes], rest[Numbers::kLanes] = {};
    numbers.read(e, access, whole, rest);
    return PairSum<Numbers::kLanes>::template of<Numbers::kRest>(whole, rest);
  }
  template <class Access, class Numbers>
  __device__ __forceinline__ void add_in_double(int e, Access access, const Numbers& numbers) {
    typename Arithmetic<T>::S x[Numbers::kLanes];
    double products[Numbers::kLanes];
    if constexpr (Numbers::kRest)
      numbers.read(e, access, products);
    else
      numbers.read(e, access, x);
#pragma unroll
    for (int j = 0; j < Numbers::kLanes; ++j) {
      const double number = Numbers::kRest ? products[j] : (double)x[j];
      finite = finite && isfinite(number);
      sum += number * number;
    }
  }
};

// bytes: 1n read (2n with theta). Lists: g_t, theta.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    squared_norm_kernel(const __grid_constant__ TensorTable<2> table, double* partials) {
  const Span<T, 2> chunk(table, blockIdx.x, kChunk);
  SquareSum<T> squares;
  if (chunk.data[1])
    squares.add(chunk, Products<T>{chunk.data[0], chunk.data[1]});
  else
    squares.add(chunk, Gradients<T>{chunk.data[0]});
  double sum[1] = {squares.sum};
  sum_for_first_thread<kSumThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum[0];
}

// bytes: 2n read. Lists: g_h, g_p. Every block that finds a number that is not finite writes the
// same 1 to *found_inf.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    grad_check_kernel(const __grid_constant__ TensorTable<2> table, double* partials,
                      float* found_inf) {
  const Span<T, 2> chunk(table, blockIdx.x, kChunk);
  SquareSum<T> squares;
  squares.add(chunk, SumsOfGradients<T>{chunk.data[0], chunk.data[1]});
  double sum[1] = {squares.sum};
  sum_for_first_thread<kSumThreads>(sum);
  const bool found = __syncthreads_or(!squares.finite);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum[0];
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
