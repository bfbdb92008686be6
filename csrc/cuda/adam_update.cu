// adam_update_, Adam and AdamW: compiled without fused multiply-add, for the bits of the CPU kernels.

#include "launch.h"
#include "multi_tensor.cuh"

namespace imbsam {
namespace cuda {
namespace {

// The scalars of a step; an address that is not null is read on the device and replaces its value.
template <class S>
struct AdamArguments {
  Adam<S> adam;  // grad_factor is made in the kernel
  double beta1, beta2;
  S grad_scale;
  bool maximize, skip;
  const S *lr_at, *grad_scale_at, *found_inf_at;
};

template <class S>
__device__ __forceinline__ Adam<S> adam_scalars(const AdamArguments<S>& a) {
  Adam<S> adam = a.adam;
  if (a.lr_at) adam.lr = *a.lr_at;
  const S unscale = S(1) / (a.grad_scale_at ? *a.grad_scale_at : a.grad_scale);
  adam.grad_factor = a.maximize ? -unscale : unscale;
  return adam;
}

constexpr int kStep = 7;  // the list with one element a tensor

// bytes: 5n read, 3n written without v_max (6n and 4n with it; 1n more written with master).
// Lists: theta, saved or master, g_h, g_p, m, v, v_max, step.
template <class T, bool kMaster>
__global__ void __launch_bounds__(kThreads)
    adam_update_kernel(const __grid_constant__ TensorTable<kStep + 1> table,
                       const AdamArguments<typename Arithmetic<T>::S> arguments) {
  typedef typename Arithmetic<T>::S S;
  typedef typename Kept<T, kMaster>::W W;
  constexpr int lanes = Pack<T>::kLanes;
  const Adam<S> adam = adam_scalars(arguments);
  const bool skip = arguments.found_inf_at ? *arguments.found_inf_at != 0 : arguments.skip;
  for_each_tile<T, false, 1>(table, [&](const Span<T, kStep>& tile) {
    T* theta = tile.data[0];
    W* from = tile.data[1] ? tile.template as<W>(1) : tile.template as<W>(0);
    const T *g_h = tile.data[2], *g_p = tile.data[3];
    W *m_at = tile.template as<W>(4), *v_at = tile.template as<W>(5);
    W* v_max_at = tile.template as<W>(6);
    if (skip) {
      if (tile.data[1]) restore_tile<T, W>(tile, from);
      return;
    }
    const float step = *static_cast<const float*>(table.data[kStep][tile.tensor]);
    const BiasCorrections<S> corrections =
        bias_corrections<S>(arguments.beta1, arguments.beta2, (int64_t)step + 1);
    for_each_pack<T, kThreads, 1>(tile.elements, tile.aligned, [&](int e, auto access) {
      Pack<W, lanes> start = access.template load_lanes<lanes>(from + e), v_max = {};
      Pack<W, lanes> m = access.template load_lanes<lanes>(m_at + e);
      Pack<W, lanes> v = access.template load_lanes<lanes>(v_at + e);
      Pack<T> p = access.load(g_p + e), h = {}, stepped;
      if (g_h) h = access.load(g_h + e);
      if (v_max_at) v_max = access.template load_lanes<lanes>(v_max_at + e);
#pragma unroll
      for (int j = 0; j < lanes; ++j) {
        const S theta_j = widened(start.lanes[j]);
        const S g = g_h ? widened(h.lanes[j]) + widened(p.lanes[j]) : widened(p.lanes[j]);
        const S d = adam_direction(theta_j, g, adam);
        const S m_j = adam_first_moment(widened(m.lanes[j]), d, adam);
        const S v_j = adam_second_moment(widened(v.lanes[j]), d, adam);
        const S bound = v_max_at ? larger(widened(v_max.lanes[j]), v_j) : v_j;
        const S next = adam_step(theta_j, m_j, (S)sqrt(bound), adam, corrections);
        m.lanes[j] = narrowed<W>(m_j);
        v.lanes[j] = narrowed<W>(v_j);
        v_max.lanes[j] = narrowed<W>(bound);
        start.lanes[j] = narrowed<W>(next);
        stepped.lanes[j] = narrowed<T>(next);
      }
      access.store(m_at + e, m);
      access.store(v_at + e, v);
      if (v_max_at) access.store(v_max_at + e, v_max);
      if constexpr (kMaster) access.store(from + e, start);
      access.store(theta + e, stepped);
    });
  });
}

}  // namespace

void adam_update_(const Table& tensors, void* const* theta, const void* const* saved,
                  const void* const* g_h, const void* const* g_p, void* const* m, void* const* v,
                  void* const* v_max, void* const* master, const void* const* step,
                  const AdamSettings& s, const DeviceScalars& at, const Stream& stream) {
  with_type_and_master(tensors.dtype, master != nullptr, [&](auto type, auto has_master) {
    typedef typename decltype(type)::T T;
    typedef typename Arithmetic<T>::S S;
    constexpr bool kMaster = decltype(has_master)::value;
    const S decay = (S)s.weight_decay;
    const AdamArguments<S> arguments = {
        {(S)s.lr, (S)s.beta1, (S)(1 - s.beta1), (S)s.beta2, (S)(1 - s.beta2), (S)s.eps,
         s.decoupled ? S(0) : decay, s.decoupled ? decay : S(0), S(1)},
        s.beta1, s.beta2, (S)s.grad_scale, s.maximize, s.skip,
        static_cast<const S*>(at.lr), static_cast<const S*>(at.grad_scale),
        static_cast<const S*>(at.found_inf)};
    launch_over_tiles("adam_update_", adam_update_kernel<T, kMaster>, kThreads, kTile, false,
                      tensors, {theta, kMaster ? master : saved, g_h, g_p, m, v, v_max, step},
                      stream, arguments);
  });
}

}  // namespace cuda
}  // namespace imbsam
