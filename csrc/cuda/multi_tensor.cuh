// What the kernels over many tensors share: elements of every dtype, 16-byte access, tiles.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <string.h>

#include "tiles.h"

namespace imbsam {
namespace cuda {

constexpr int kThreads = 256;  // a block of the elementwise kernels
// Their tiles: short, so that the last ones end together on all multiprocessors. A multiple of
// a pack in every dtype, so that tiles of an aligned tensor are aligned.
constexpr int kTile = 4096;

// ---------------------------------------------------------------- elements

// S is the arithmetic dtype of data T.
template <class T>
struct Arithmetic {
  typedef float S;
};
template <>
struct Arithmetic<double> {
  typedef double S;
};

// The dtype in which the weights and the base's state are kept.
template <class T, bool kMaster>
struct Kept {
  typedef T W;
};
template <class T>
struct Kept<T, true> {
  typedef typename Arithmetic<T>::S W;
};

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ double widened(double x) { return x; }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T narrowed(typename Arithmetic<T>::S x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrowed<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrowed<__half>(float x) {
  return __float2half_rn(x);
}

// ---------------------------------------------------------------- 16-byte access

template <class T, int kCount = 16 / (int)sizeof(T)>
struct Pack {
  static constexpr int kLanes = kCount;
  T lanes[kLanes];
};

// The access to a pack that is whole and aligned to 16 bytes; with twice as many lanes as fit, for
// master weights beside data of half their size, to two of them.
struct Whole {
  template <int kCount, class T>
  __device__ __forceinline__ Pack<T, kCount> load_lanes(const T* p) const {
    Pack<T, kCount> pack;
    uint4 bits[sizeof(pack) / 16];
#pragma unroll
    for (int i = 0; i < (int)(sizeof(pack) / 16); ++i) bits[i] = reinterpret_cast<const uint4*>(p)[i];
    memcpy(&pack, bits, sizeof(pack));
    return pack;
  }
  template <class T>
  __device__ __forceinline__ Pack<T> load(const T* p) const {
    return load_lanes<Pack<T>::kLanes>(p);
  }
  template <class T, int kCount>
  __device__ __forceinline__ void store(T* p, const Pack<T, kCount>& pack) const {
    uint4 bits[sizeof(pack) / 16];
    memcpy(bits, &pack, sizeof(pack));
#pragma unroll
    for (int i = 0; i < (int)(sizeof(pack) / 16); ++i) reinterpret_cast<uint4*>(p)[i] = bits[i];
  }
};

// The access to single elements kApart from each other, those before `left`; the others read as 0.
// With the threads of a block next to each other its accesses coalesce.
template <int kApart>
struct Singles {
  int left;
  template <int kCount, class T>
  __device__ __forceinline__ Pack<T, kCount> load_lanes(const T* p) const {
    Pack<T, kCount> pack;
#pragma unroll
    for (int j = 0; j < kCount; ++j) pack.lanes[j] = j * kApart < left ? p[j * kApart] : T(0.0f);
    return pack;
  }
  template <class T>
  __device__ __forceinline__ Pack<T> load(const T* p) const {
    return load_lanes<Pack<T>::kLanes>(p);
  }
  template <class T, int kCount>
  __device__ __forceinline__ void store(T* p, const Pack<T, kCount>& pack) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (j * kApart < left) p[j * kApart] = pack.lanes[j];
  }
};

// Calls f(first element, access) for this thread's elements of a span, as many as a pack holds at
// a time: packs where all lists are aligned, else single elements, as a whole block coalesced.
template <class T, int kBlock, int kUnroll, class F>
__device__ __forceinline__ void for_each_pack(int elements, bool aligned, F f) {
  constexpr int lanes = Pack<T>::kLanes;
  const int whole = aligned ? elements / lanes : 0;
#pragma unroll kUnroll
  for (int v = threadIdx.x; v < whole; v += kBlock) f(v * lanes, Whole());
#pragma unroll 1
  for (int e = whole * lanes + threadIdx.x; e < elements; e += kBlock * lanes)
    f(e, Singles<kBlock>{elements - e});
}

// The same for sums, whose order must not depend on the alignment: the elements of a thread are
// those of its packs in every case.
template <class T, int kBlock, int kUnroll, class F>
__device__ __forceinline__ void for_each_pack_in_order(int elements, bool aligned, F f) {
  constexpr int lanes = Pack<T>::kLanes;
  const int whole = aligned ? elements / lanes : 0;
  int v = threadIdx.x;
#pragma unroll kUnroll
  for (; v < whole; v += kBlock) f(v * lanes, Whole());
#pragma unroll 1
  for (; v * lanes < elements; v += kBlock) f(v * lanes, Singles<1>{elements - v * lanes});
}

// ---------------------------------------------------------------- tiles

// One tile with the addresses of its first elements in the first lists, null in an absent one.
template <class T, int kLists>
struct Span {
  T* data[kLists];
  int64_t begin;  // its first element in the tensor
  int tensor;     // in the table
  int elements;
  bool aligned;  // all addresses, to 16 bytes

  template <int kTable>
  __device__ __forceinline__ Span(const TensorTable<kTable>& table, int tile, int tile_elements) {
    const Tile at = locate(table, tile, tile_elements);
    begin = at.begin;
    tensor = at.tensor;
    uintptr_t bits = 0;
#pragma unroll
    for (int l = 0; l < kLists; ++l) {
      T* start = static_cast<T*>(table.data[l][at.tensor]);
      bits |= reinterpret_cast<uintptr_t>(start);
      data[l] = start ? start + at.begin : nullptr;
    }
    elements = at.elements;
    aligned = bits % 16 == 0;
  }

  // The address in a list that holds elements of another dtype.
  template <class W>
  __device__ __forceinline__ W* as(int list) const {
    return data[list] ? reinterpret_cast<W*>(data[list] - begin) + begin : nullptr;
  }
};

// Calls f(span) for this block's tiles: every gridDim.x-th one, in rising or falling order. The
// last kScalarLists lists have one element a tensor, and no part in the span.
template <class T, bool kReverse, int kScalarLists = 0, int kLists, class F>
__device__ __forceinline__ void for_each_tile(const TensorTable<kLists>& table, F f) {
  const int tiles = table.first_tile[table.count];
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int tile = (int)(kReverse ? tiles - 1 - i : i);
    f(Span<T, kLists - kScalarLists>(table, tile, kTile));
  }
}

// Writes to theta, the span's first list, what `from` has for it.
template <class T, class W, int kLists>
__device__ __forceinline__ void restore_tile(const Span<T, kLists>& tile, const W* from) {
  constexpr int lanes = Pack<T>::kLanes;
  T* theta = tile.data[0];
  for_each_pack<T, kThreads, 1>(tile.elements, tile.aligned, [&](int e, auto access) {
    const Pack<W, lanes> start = access.template load_lanes<lanes>(from + e);
    Pack<T> rounded;
#pragma unroll
    for (int j = 0; j < lanes; ++j) {
      if constexpr (sizeof(T) == sizeof(W))
        rounded.lanes[j] = start.lanes[j];  // the very bits
      else
        rounded.lanes[j] = narrowed<T>(start.lanes[j]);
    }
    access.store(theta + e, rounded);
  });
}

}  // namespace cuda
}  // namespace imbsam
