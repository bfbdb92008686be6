// merge_: restores theta and adds the head gradient to the tail gradient.

#include "launch.h"
#include "multi_tensor.cuh"

namespace imbsam {
namespace cuda {
namespace {

// bytes: 3n read, 2n written with all lists present. Lists: theta, saved, g_h, g_p.
template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ TensorTable<4> table) {
  for_each_tile<T, false>(table, [&](const Span<T, 4>& tile) {
    T* theta = tile.data[0];
    const T *saved = tile.data[1], *g_h = tile.data[2];
    T* g_p = tile.data[3];
    for_each_pack<T, kThreads, 1>(tile.elements, tile.aligned, [&](int e, auto access) {
      Pack<T> start = {}, h = {}, p = {};
      if (saved) start = access.load(saved + e);
      if (g_h) {
        h = access.load(g_h + e);
        p = access.load(g_p + e);
      }
      if (saved) access.store(theta + e, start);
      if (!g_h) return;
#pragma unroll
      for (int j = 0; j < Pack<T>::kLanes; ++j)
        p.lanes[j] = narrowed<T>(widened(h.lanes[j]) + widened(p.lanes[j]));
      access.store(g_p + e, p);
    });
  });
}

}  // namespace

void merge_(const Table& tensors, void* const* theta, const void* const* saved,
            const void* const* g_h, void* const* g_p, const Stream& stream) {
  if (!saved && !g_h) return;
  with_type(tensors.dtype, [&](auto type) {
    launch_over_tiles("merge_", merge_kernel<typename decltype(type)::T>, kThreads, kTile, false,
                      tensors, {theta, saved, g_h, g_p}, stream);
  });
}

}  // namespace cuda
}  // namespace imbsam
