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

// bytes: 4n read, 2n written with all lists present. Lists: theta, saved, g_h, g_p, m.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sgd_update_kernel(const __grid_constant__ TensorTable<5> table,
                      const SgdArguments<typename Arithmetic<T>::S> arguments) {
  typedef typename Arithmetic<T>::S S;
  const Sgd<S> sgd = sgd_scalars(arguments);
  const bool skip = arguments.found_inf_at ? *arguments.found_inf_at != 0 : arguments.skip;
  for_each_tile<T, false>(table, [&](const Span<T, 5>& tile) {
    T* theta = tile.data[0];
    const T *saved = tile.data[1], *g_h = tile.data[2], *g_p = tile.data[3];
    T* m = tile.data[4];
    const T* from = saved ? saved : theta;
    if (skip) {
      if (saved)
        for_each_pack<T, kThreads, 1>(tile.elements, tile.aligned, [&](int e, auto access) {
          access.store(theta + e, access.load(saved + e));
        });
      return;
    }
    for_each_pack<T, kThreads, 1>(tile.elements, tile.aligned, [&](int e, auto access) {
      Pack<T> start = access.load(from + e), p = access.load(g_p + e), h = {}, velocity = {};
      if (g_h) h = access.load(g_h + e);
      if (m) velocity = access.load(m + e);
#pragma unroll
      for (int j = 0; j < Pack<T>::kLanes; ++j) {
        const S theta_j = widened(start.lanes[j]);
        const S g = g_h ? widened(h.lanes[j]) + widened(p.lanes[j]) : widened(p.lanes[j]);
        const S d = sgd_direction(theta_j, g, sgd);
        const S moved = m ? sgd_momentum(widened(velocity.lanes[j]), d, sgd) : d;
        velocity.lanes[j] = narrowed<T>(moved);
        start.lanes[j] = narrowed<T>(sgd_step(theta_j, moved, d, sgd));
      }
      if (m) access.store(m + e, velocity);
      access.store(theta + e, start);
    });
  });
}

}  // namespace

void sgd_update_(const Table& tensors, void* const* theta, const void* const* saved,
                 const void* const* g_h, const void* const* g_p, void* const* m,
                 const SgdSettings& s, const DeviceScalars& at, const Stream& stream) {
  with_type(tensors.dtype, [&](auto type) {
    typedef typename decltype(type)::T T;
    typedef typename Arithmetic<T>::S S;
    const SgdArguments<S> arguments = {
        {(S)s.lr, (S)s.momentum, (S)(1 - s.dampening), (S)s.weight_decay, S(1), m && s.nesterov},
        (S)s.grad_scale, s.maximize, s.skip,
        static_cast<const S*>(at.lr), static_cast<const S*>(at.grad_scale),
        static_cast<const S*>(at.found_inf)};
    launch_over_tiles("sgd_update_", sgd_update_kernel<T>, kThreads, kTile, false, tensors,
                      {theta, saved, g_h, g_p, m}, stream, arguments);
  });
}

}  // namespace cuda
}  // namespace imbsam
