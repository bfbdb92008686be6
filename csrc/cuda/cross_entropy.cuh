// What the cross-entropies share: a row of logits as packs, its maximum and sum of exponentials,
// and sums over rows.
#pragma once

#include <math.h>

#include "launch.h"
#include "multi_tensor.cuh"
#include "reduce.cuh"

#if defined(__CUDACC__)
static __device__ __forceinline__ float exp2_approx(float y) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
  return power;
}
#endif

namespace imbsam {
namespace cuda {
namespace {

constexpr int kRowThreads = 512;  // of the largest block; small rows take fewer
constexpr int kRowUnroll = 4;     // packs of a row that a thread has under way

// Blocks a multiprocessor must hold: double and smoothing need the registers of the second one.
template <class T, bool kSmooth>
constexpr int kRowBlocks = kSmooth || sizeof(T) == 8 ? 1 : 2;

// e^x for data of type T. For bfloat16 and float16, of which a GPU reads so many that instructions
// count, the hardware's 2^y, y = x log2(e): off by its 2 ulp and by a rounding of y. Sums of
// exponentials and gradients weigh that by e^x, which makes up for a large y. Plain torch's float
// for float data.
template <class T>
__device__ __forceinline__ float exp_(float x) {
  if (sizeof(T) == 2) return exp2_approx(x * 1.4426950408889634f);
  return expf(x);
}
template <class T>
__device__ __forceinline__ double exp_(double x) { return exp(x); }
__device__ __forceinline__ float largest(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double largest(double a, double b) { return fmax(a, b); }

// What a row is shifted by before exp: its maximum, but 0 where every logit is -inf so far.
template <class S>
__device__ __forceinline__ S shift_of(S max) {
  return max == -(S)INFINITY ? S(0) : max;
}

// The sums over the elements of a row that one thread has met so far.
template <class T, bool kSmooth>
struct RowSums {
  typedef typename Arithmetic<T>::S S;
  S max = -(S)INFINITY;
  S exp_sum = 0;                     // sum exp(z - shift)
  double weighted = 0, weights = 0;  // sum w (z - shift) and sum w, with smoothing only

  __device__ __forceinline__ void raise(S higher) {
    const S shift = shift_of(higher);
    exp_sum *= exp_<T>(max - shift);
    if (kSmooth) weighted += weights * ((double)shift_of(max) - (double)shift);
    max = higher;
  }

  // `largest` passes not-a-number over; exp does not.
  template <int n>
  __device__ __forceinline__ void add(const S (&z)[n]) {
    S higher = max;
#pragma unroll
    for (int j = 0; j < n; ++j) higher = largest(higher, z[j]);
    if (higher > max) raise(higher);
    const S shift = shift_of(max);
    S sum = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) sum += exp_<T>(z[j] - shift);
    exp_sum += sum;
  }

  // w: the weights of these classes, null for 1. After `add` of the same elements.
  template <int n>
  __device__ __forceinline__ void add_weighted(const S (&z)[n], const S* w) {
    if (!kSmooth) return;
    const S shift = shift_of(max);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const double weight = w ? (double)w[j] : 1.0;
      weighted += weight * ((double)z[j] - (double)shift);
      weights += weight;
    }
  }
};

// A row as packs from its first aligned element on, and single elements before and after them.
template <class T>
struct RowLayout {
  int before, packs, singles;

  // `apart`: another row is read beside this one whose packs reach across two of its own, so that
  // the first and the last pack of this row are left to single elements.
  __device__ __forceinline__ RowLayout(const T* row, int classes, bool apart = false) {
    constexpr int lanes = Pack<T>::kLanes;
    const int to_aligned = (int)((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
    before = to_aligned + (apart ? lanes : 0);
    before = before < classes ? before : classes;
    const int whole = (classes - before) / lanes - (apart ? 1 : 0);
    packs = whole > 0 ? whole : 0;
    singles = classes - packs * lanes;
  }
  __device__ __forceinline__ int first(int pack) const { return before + pack * Pack<T>::kLanes; }
  __device__ __forceinline__ int single(int i) const {
    return i < before ? i : i + packs * Pack<T>::kLanes;
  }
};

template <class T>
__device__ __forceinline__ void load_pack(typename Arithmetic<T>::S (&z)[Pack<T>::kLanes],
                                          const T* p) {
  const Pack<T> pack = Whole().load(p);
#pragma unroll
  for (int j = 0; j < Pack<T>::kLanes; ++j) z[j] = widened(pack.lanes[j]);
}

template <class T>
__device__ __forceinline__ void write_zeros(T* row, int classes) {
  const RowLayout<T> layout(row, classes);
  for (int v = threadIdx.x; v < layout.packs; v += blockDim.x)
    Whole().store(row + layout.first(v), Pack<T>{});
  for (int j = threadIdx.x; j < layout.singles; j += blockDim.x) row[layout.single(j)] = T(0.0f);
}

// The 16 bytes at p, `after` bytes behind a boundary, from the two aligned packs that they lie in.
template <class T>
__device__ __forceinline__ Pack<T> load_across(const T* p, unsigned after) {
  const uint4* aligned = reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(p) - after);
  const uint4 low = aligned[0], high = aligned[1];
  unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) words[i] = after & 8 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = after & 4 ? words[i + 1] : words[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], 8 * (after & 3));
  Pack<T> pack;
  memcpy(&pack, words, sizeof(pack));
  return pack;
}

template <class T, bool kSmooth>
__device__ __forceinline__ RowSums<T, kSmooth> thread_sums(
    const T* row, int classes, const typename Arithmetic<T>::S* w) {
  typedef typename Arithmetic<T>::S S;
  constexpr int lanes = Pack<T>::kLanes;
  const RowLayout<T> layout(row, classes);
  const int stride = blockDim.x;
  RowSums<T, kSmooth> sums;
  // Every thread has at most one element outside of packs; its load begins here.
  const bool has_single = (int)threadIdx.x < layout.singles;
  const int k = has_single ? layout.single(threadIdx.x) : 0;
  const S single[1] = {has_single ? widened(row[k]) : -(S)INFINITY};
  const auto add = [&](int v, auto is_last) {
    constexpr bool kLast = decltype(is_last)::value;
    constexpr int kMost = kLast ? kRowUnroll - 1 : kRowUnroll;  // packs of this round
    S z[kMost][lanes];
#pragma unroll
    for (int u = 0; u < kMost; ++u) {
      if (!kLast || v + u * stride < layout.packs) {
        load_pack<T>(z[u], row + layout.first(v + u * stride));
      } else {
#pragma unroll
        for (int j = 0; j < lanes; ++j) z[u][j] = -(S)INFINITY;
      }
    }
    sums.add(reinterpret_cast<S(&)[kMost * lanes]>(z));
    if constexpr (kSmooth) {
#pragma unroll
      for (int u = 0; u < kMost; ++u)
        if (!kLast || v + u * stride < layout.packs)
          sums.add_weighted(z[u], w ? w + layout.first(v + u * stride) : nullptr);
    }
  };
  int v = threadIdx.x;
  for (; v + (kRowUnroll - 1) * stride < layout.packs; v += kRowUnroll * stride)
    add(v, std::false_type());
  if (v < layout.packs) add(v, std::true_type());
  if (has_single) {
    sums.add(single);
    sums.add_weighted(single, w ? w + k : nullptr);
  }
  return sums;
}

constexpr int kRowsSummed = 4096;  // by a block; by the last one up to twice as many

// Sums a block of rows, in a fixed order.
struct LossSums {
  double head = 0, tail = 0, counted = 0;

  // For thread 0 alone, once in a kernel.
  __device__ __forceinline__ void add_up() {
    double sums[3] = {head, tail, counted};
    sum_for_first_thread<kRowThreads>(sums);
    head = sums[0];
    tail = sums[1];
    counted = sums[2];
  }
  template <class S>
  __device__ __forceinline__ void write(double batch_size, S* head_at, S* tail_at, S* b) const {
    const double divisor = batch_size < 0 ? counted : batch_size;
    *head_at = (S)(head / fmax(divisor, 1.0));
    *tail_at = (S)(tail / fmax(divisor, 1.0));
    *b = (S)divisor;
  }
};

// Whole warps, as many as have about kRowUnroll packs of a row each.
template <class T>
int row_threads(int64_t classes) {
  const int64_t useful = classes / (Pack<T>::kLanes * kRowUnroll);
  int threads = 32;
  while (threads < useful && threads < kRowThreads) threads *= 2;
  return threads;
}

void check_limits(const char* op, const CrossEntropySettings& s) {
  constexpr int64_t limit = 1 << 30;  // blocks of a grid, and indices in a row, are ints
  IMBSAM_CHECK(s.rows <= limit && s.classes <= limit,
               op << ": logits is (" << s.rows << ", " << s.classes << "), expected at most "
                  << limit << " rows and classes on a CUDA device");
}

template <class S>
const S* as(const void* p) {
  return static_cast<const S*>(p);
}

}  // namespace
}  // namespace cuda
}  // namespace imbsam
