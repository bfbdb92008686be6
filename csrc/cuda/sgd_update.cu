// sgd_update_: compiled without fused multiply-add, for the bits of the CPU kernels.

#include "launch.h"
#include "multi_tensor.cuh"

namespace imbsam {
namespace cuda {
namespace {

// The scalars of a step; an address that is not null is read on the device and replaces its value.
template <class S>
struct SgdArguments {
  Sgd<S> sgd;  // grad_factor is made in the kernel
  S grad_scale;
  bool maximize, skip;
  const S *lr_at, *grad_scale_at, *found_inf_at;
};

template <class S>
__device__ __forceinline__ Sgd<S> sgd_scalars(const SgdArguments<S>& a) {
  Sgd<S> sgd = a.sgd;
  if (a.lr_at) sgd.lr = *a.lr_at;
  const S unscale = S(1) / (a.grad_scale_at ? *a.grad_scale_at : a.grad_scale);
  sgd.grad_factor = a.maximize ? -unscale : unscale;
  return sgd;
}

// bytes: 4n read, 2n written with all lists present (3n written with master). Lists: theta, saved
// or master, g_h, g_p, m.
template <class T, bool kMaster>
__global__ void __launch_bounds__(kThreads)
    sgd_update_kernel(const __grid_constant__ TensorTable<5> table,
                      const SgdArguments<typename Arithmetic<T>::S> arguments) {
  typedef typename Arithmetic<T>::S S;
  typedef typename Kept<T, kMaster>::W W;
  constexpr int lanes = Pack<T>::kLanes;
  const Sgd<S> sgd = sgd_scalars(arguments);
  const bool skip = arguments.found_inf_at ? *arguments.found_inf_at != 0 : arguments.skip;
  for_each_tile<T, false>(table, [&](const Span<T, 5>& tile) {
    T* theta = tile.data[0];
    W* from = tile.data[1] ? tile.template as<W>(1) : tile.template as<W>(0);
    const T *g_h = tile.data[2], *g_p = tile.data[3];
    W* m = tile.template as<W>(4);
    if (skip) {
      if (tile.data[1]) restore_tile<T, W>(tile, from);
      return;
    }
    for_each_pack<T, kThreads, 1>(tile.elements, tile.aligned, [&](int e, auto access) {
      Pack<W, lanes> start = access.template load_lanes<lanes>(from + e), velocity = {};
      Pack<T> p = access.load(g_p + e), h = {}, stepped;
      if (g_h) h = access.load(g_h + e);
      if (m) velocity = access.template load_lanes<lanes>(m + e);
#pragma unroll
      for (int j = 0; j < lanes; ++j) {
        const S theta_j = widened(start.lanes[j]);
        const S g = g_h ? widened(h.lanes[j]) + widened(p.lanes[j]) : widened(p.lanes[j]);
        const S d = sgd_direction(theta_j, g, sgd);
        const S moved = m ? sgd_momentum(widened(velocity.lanes[j]), d, sgd) : d;
        const S next = sgd_step(theta_j, moved, d, sgd);
        velocity.lanes[j] = narrowed<W>(moved);
        start.lanes[j] = narrowed<W>(next);
        stepped.lanes[j] = narrowed<T>(next);
      }
      if (m) access.store(m + e, velocity);
      if constexpr (kMaster) access.store(from + e, start);
      access.store(theta + e, stepped);
    });
  });
}

}  // namespace

void sgd_update_(const Table& tensors, void* const* theta, const void* const* saved,
                 const void* const* g_h, const void* const* g_p, void* const* m,
                 void* const* master, const SgdSettings& s, const DeviceScalars& at,
                 const Stream& stream) {
  with_type_and_master(tensors.dtype, master != nullptr, [&](auto type, auto has_master) {
    typedef typename decltype(type)::T T;
    typedef typename Arithmetic<T>::S S;
    const SgdArguments<S> arguments = {
        {(S)s.lr, (S)s.momentum, (S)(1 - s.dampening), (S)s.weight_decay, S(1), m && s.nesterov},
        (S)s.grad_scale, s.maximize, s.skip,
        static_cast<const S*>(at.lr), static_cast<const S*>(at.grad_scale),
        static_cast<const S*>(at.found_inf)};
    constexpr bool kMaster = decltype(has_master)::value;
    launch_over_tiles("sgd_update_", sgd_update_kernel<T, kMaster>, kThreads, kTile, false,
                      tensors, {theta, kMaster ? master : saved, g_h, g_p, m}, stream, arguments);
  });
}

}  // namespace cuda
}  // namespace imbsam
