// The update of a base on the device: theta, g_h, g_p and the state in packs, its formula on every
// lane. Each base is compiled by a file of its own, without fused multiply-add, for the bits of the
// CPU kernels.
#pragma once

#include "launch.h"
#include "multi_tensor.cuh"
#include "reduce.cuh"

namespace imbsam {
namespace cuda {

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

#include "../bases.h"

// What a step takes; an address that is not null is read on the device and replaces its value.
template <Base kBase, class S>
struct UpdateArguments {
  Formula<kBase, S> formula;  // grad_factor is made in the kernel
  S grad_scale;
  bool maximize, skip;
  const S *lr_at, *grad_scale_at, *found_inf_at;
};

template <Base kBase, class S>
__device__ __forceinline__ Formula<kBase, S> formula_of(const UpdateArguments<kBase, S>& a) {
  Formula<kBase, S> formula = a.formula;
  if (a.lr_at) formula.lr = *a.lr_at;
  const S unscale = S(1) / (a.grad_scale_at ? *a.grad_scale_at : a.grad_scale);
  formula.grad_factor = a.maximize ? -unscale : unscale;
  return formula;
}

// The lists of a table: theta, saved or master, g_h, g_p, the state, and where the base has counts
// step, with one element a tensor.
template <Base kBase>
struct Of {
  static constexpr int kState = entry(kBase).state_count, kLists = 4 + kState;
  static constexpr bool kCounts = entry(kBase).counts;
  static constexpr int kListsAndStep = kLists + kCounts;
  static constexpr unsigned kRequired = required_state(kBase);
};

// bytes: see kBases
template <class T, bool kMaster, Base kBase>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ TensorTable<Of<kBase>::kListsAndStep> table,
                  const UpdateArguments<kBase, typename Arithmetic<T>::S> arguments) {
  typedef typename Arithmetic<T>::S S;
  typedef typename Kept<T, kMaster>::W W;
  constexpr int lanes = Pack<T>::kLanes, kState = Of<kBase>::kState, kLists = Of<kBase>::kLists;
  constexpr unsigned kRequired = Of<kBase>::kRequired;
  constexpr bool kCounts = Of<kBase>::kCounts;
  const Formula<kBase, S> formula = formula_of(arguments);
  const bool skip = arguments.found_inf_at ? *arguments.found_inf_at != 0 : arguments.skip;
  // In float64, for parameters that mostly took the same number of steps.
  const auto after = [&](float step) {
    OfTensor<kBase, S> found;
    of_tensor(found, formula, (int64_t)step + 1);
    return found;
  };
  OnceABlock<OfTensor<kBase, S>> after_step;
  for_each_tile<T, false, kCounts>(table, [&](const Span<T, kLists>& tile) {
    T* theta = tile.data[0];
    W* from = tile.data[1] ? tile.template as<W>(1) : tile.template as<W>(0);
    const T *g_h = tile.data[2], *g_p = tile.data[3];
    W* at[kState];
    bool has[kState];
#pragma unroll
    for (int k = 0; k < kState; ++k) {
      at[k] = tile.template as<W>(4 + k);
      has[k] = kRequired >> k & 1 || at[k];
    }
    if (skip) {
      if (tile.data[1]) restore_tile<T, W>(tile, from);
      return;
    }
    OfTensor<kBase, S> once;
    if constexpr (kCounts)
      once = after_step(*static_cast<const float*>(table.data[kLists][tile.tensor]), after);
    for_each_pack<T, kThreads, 1>(tile.elements, tile.aligned, [&](int e, auto access) {
      Pack<W, lanes> start = access.template load_lanes<lanes>(from + e), kept[kState];
      Pack<T> p = access.load(g_p + e), h = {}, next;
      if (g_h) h = access.load(g_h + e);
#pragma unroll
      for (int k = 0; k < kState; ++k) {
        kept[k] = {};
        if (has[k]) kept[k] = access.template load_lanes<lanes>(at[k] + e);
      }
#pragma unroll
      for (int j = 0; j < lanes; ++j) {
        S state[kState];
#pragma unroll
        for (int k = 0; k < kState; ++k) state[k] = widened(kept[k].lanes[j]);
        const S g = g_h ? widened(h.lanes[j]) + widened(p.lanes[j]) : widened(p.lanes[j]);
        const S moved = stepped(formula, once, (S)widened(start.lanes[j]), g, state, has);
#pragma unroll
        for (int k = 0; k < kState; ++k) kept[k].lanes[j] = narrowed<W>(state[k]);
        start.lanes[j] = narrowed<W>(moved);
        next.lanes[j] = narrowed<T>(moved);
      }
#pragma unroll
      for (int k = 0; k < kState; ++k)
        if (has[k]) access.store(at[k] + e, kept[k]);
      if constexpr (kMaster) access.store(from + e, start);
      access.store(theta + e, next);
    });
  });
}

template <Base kBase>
void launch_update(const Table& tensors, const UpdateLists& lists, const void* const* step,
                   const UpdateSettings& s, const DeviceScalars& at, const Stream& stream) {
  with_type_and_master(tensors.dtype, lists.master != nullptr, [&](auto type, auto has_master) {
    typedef typename decltype(type)::T T;
    typedef typename Arithmetic<T>::S S;
    constexpr bool kMaster = decltype(has_master)::value;
    UpdateArguments<kBase, S> arguments = {};
    arguments.formula.lr = (S)s.lr;
    arguments.formula.grad_factor = S(1);
    fill_own(arguments.formula, s.own);
    arguments.grad_scale = (S)s.grad_scale;
    arguments.maximize = s.maximize;
    arguments.skip = s.skip;
    arguments.lr_at = static_cast<const S*>(at.lr);
    arguments.grad_scale_at = static_cast<const S*>(at.grad_scale);
    arguments.found_inf_at = static_cast<const S*>(at.found_inf);
    const void* const* all[Of<kBase>::kListsAndStep] = {
        lists.theta, kMaster ? lists.master : lists.saved, lists.g_h, lists.g_p};
    for (int k = 0; k < Of<kBase>::kState; ++k) all[4 + k] = lists.state[k];
    if constexpr (Of<kBase>::kCounts) all[Of<kBase>::kLists] = step;
    launch_over_tiles(entry(kBase).op, update_kernel<T, kMaster, kBase>, kThreads, kTile, false,
                      tensors, all, stream, arguments);
  });
}

}  // namespace cuda
}  // namespace imbsam
