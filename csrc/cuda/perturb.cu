// perturb_: compiled without fused multiply-add, for the bits of the CPU kernels.

#include "launch.h"
#include "multi_tensor.cuh"
#include "reduce.cuh"

namespace imbsam {
namespace cuda {
namespace {

// bytes: 2n read, 2n written, with held 3n and 3n. Lists: theta, g_t; then master, which is read in
// place of theta, and g_t is not written; then held. Every block adds the partial sums, in one order.
// Backwards: what squared_norm read last is still in the L2 cache.
template <class T, bool kMaster, bool kHeld>
__global__ void __launch_bounds__(kThreads)
    perturb_kernel(const __grid_constant__ TensorTable<2 + kMaster + kHeld> table,
                   const double* partials, int64_t count, double rho, bool adaptive) {
  typedef typename Arithmetic<T>::S S;
  typedef typename Kept<T, kMaster>::W W;
  constexpr int lists = 2 + kMaster + kHeld, lanes = Pack<T>::kLanes;
  double squared_norm = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) squared_norm += partials[i];
  const S scale = perturbation_scale<S>(block_sum<kThreads>(squared_norm), rho);
  for_each_tile<T, true>(table, [&](const Span<T, lists>& tile) {
    T *theta = tile.data[0], *g_t = tile.data[1];
    const W* from = tile.template as<W>(kMaster ? 2 : 0);
    for_each_pack<T, kThreads, 1>(tile.elements, tile.aligned, [&](int e, auto access) {
      const Pack<W, lanes> start = access.template load_lanes<lanes>(from + e);
      const Pack<T> g = access.load(g_t + e);
      Pack<T> moved;
#pragma unroll
      for (int j = 0; j < Pack<T>::kLanes; ++j)
        moved.lanes[j] = narrowed<T>(
            perturbed(widened(start.lanes[j]), widened(g.lanes[j]), scale, adaptive));
      if constexpr (kHeld) {
        T* held = tile.data[lists - 1];
        Pack<T> rest = access.load(held + e);
#pragma unroll
        for (int j = 0; j < Pack<T>::kLanes; ++j)
          rest.lanes[j] = narrowed<T>(widened(rest.lanes[j]) - widened(g.lanes[j]));
        access.store(held + e, rest);
      }
      if constexpr (!kMaster) access.store(g_t + e, start);
      access.store(theta + e, moved);
    });
  });
}

}  // namespace

void perturb_(const Table& tensors, void* const* theta, void* const* g_t,
              const void* const* master, void* const* held, const double* partials,
              int64_t partial_count, double rho, bool adaptive, const Stream& stream) {
  with_type_and_master(tensors.dtype, master != nullptr, [&](auto type, auto has_master) {
    typedef typename decltype(type)::T T;
    constexpr bool kMaster = decltype(has_master)::value;
    const auto launch_on = [&](auto* kernel, const auto&... lists) {
      launch_over_tiles("perturb_", kernel, kThreads, kTile, true, tensors, {lists...}, stream,
                        partials, partial_count, rho, adaptive);
    };
    if constexpr (kMaster) {
      if (held)
        launch_on(perturb_kernel<T, true, true>, theta, g_t, master, held);
      else
        launch_on(perturb_kernel<T, true, false>, theta, g_t, master);
    } else if (held) {
      launch_on(perturb_kernel<T, false, true>, theta, g_t, held);
    } else {
      launch_on(perturb_kernel<T, false, false>, theta, g_t);
    }
  });
}

}  // namespace cuda
}  // namespace imbsam
