// The per-element arithmetic of the optimizer phases, written once for scalars and vectors.
//
// V is a float or double, or a vector of them; S the matching scalar. Multiplications and
// additions are kept apart (no fused multiply-add), so that every instruction set agrees.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define IMBSAM_INLINE static __host__ __device__ __forceinline__
#else
// Internal linkage: each instruction set must keep its own copy.
#define IMBSAM_INLINE static inline __attribute__((always_inline))
#endif

// rho / (norm + guard), rounded as torch rounds a number divided by a tensor
template <class S>
IMBSAM_INLINE S perturbation_scale(double squared_norm, double rho) {
  return S(1) / ((S)sqrt(squared_norm) + S(1e-16)) * (S)rho;
}

// theta + epsilon
template <class V, class S>
IMBSAM_INLINE V perturbed(V theta, V g_t, S scale, bool adaptive) {
  return theta + (adaptive ? theta * theta * g_t : g_t) * scale;
}

// The scalars of one SGD step, converted to the arithmetic dtype once.
template <class S>
struct Sgd {
  S lr, momentum, one_minus_dampening, weight_decay;
  S grad_factor;  // undoes the loss scale; negative to maximize
  bool nesterov;
};

// d = g + weight_decay theta
template <class V, class S>
IMBSAM_INLINE V sgd_direction(V theta, V g, const Sgd<S>& sgd) {
  return g * sgd.grad_factor + theta * sgd.weight_decay;
}

// m <- momentum m + (1 - dampening) d
template <class V, class S>
IMBSAM_INLINE V sgd_momentum(V m, V d, const Sgd<S>& sgd) {
  return m * sgd.momentum + d * sgd.one_minus_dampening;
}

// theta - lr m, with m and d after sgd_momentum
template <class V, class S>
IMBSAM_INLINE V sgd_step(V theta, V m, V d, const Sgd<S>& sgd) {
  return theta - (sgd.nesterov ? d + m * sgd.momentum : m) * sgd.lr;
}
