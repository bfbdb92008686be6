// The per-element arithmetic of the optimizer phases, written once for scalars and vectors.
//
// V is a float or double, or a vector of them; S the matching scalar. Multiplications and
// additions are kept apart (no fused multiply-add), so that every instruction set agrees.
#pragma once

#include <math.h>
#include <stdint.h>

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

// base^exponent by squaring: multiplications alone, for the same bits everywhere
IMBSAM_INLINE double power(double base, int64_t exponent) {
  double product = 1;
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) product *= base;
  return product;
}

// The scalars of one step of Adam or AdamW, converted to the arithmetic dtype once.
template <class S>
struct Adam {
  S lr, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  S coupled, decoupled;  // the weight decay in the gradient (Adam) and beside it (AdamW)
  S grad_factor;         // as in Sgd
};

// What m and the root of v are multiplied by, for they began as 0: 1 / (1 - beta1^step) and
// 1 / sqrt(1 - beta2^step)
template <class S>
struct BiasCorrections {
  S m, root_v;
};

template <class S>
IMBSAM_INLINE BiasCorrections<S> bias_corrections(double beta1, double beta2, int64_t step) {
  return {(S)(1 / (1 - power(beta1, step))), (S)(1 / sqrt(1 - power(beta2, step)))};
}

// d = g + weight_decay theta, for Adam
template <class V, class S>
IMBSAM_INLINE V adam_direction(V theta, V g, const Adam<S>& adam) {
  return g * adam.grad_factor + theta * adam.coupled;
}

// m <- beta1 m + (1 - beta1) d
template <class V, class S>
IMBSAM_INLINE V adam_first_moment(V m, V d, const Adam<S>& adam) {
  return m * adam.beta1 + d * adam.one_minus_beta1;
}

// v <- beta2 v + (1 - beta2) d^2
template <class V, class S>
IMBSAM_INLINE V adam_second_moment(V v, V d, const Adam<S>& adam) {
  return v * adam.beta2 + d * d * adam.one_minus_beta2;
}

// The larger one; not-a-number, where one of them is
template <class V>
IMBSAM_INLINE V larger(V a, V b) {
  return (a >= b) | (a != a) ? a : b;
}

// theta - lr (m^ / (sqrt(v^) + eps) + weight_decay theta), ^ for the bias corrections, the weight
// decay for AdamW
template <class V, class S>
IMBSAM_INLINE V adam_step(V theta, V m, V root_v, const Adam<S>& adam,
                          const BiasCorrections<S>& corrections) {
  const V step = (m * corrections.m) / (root_v * corrections.root_v + adam.eps);
  return theta - (step + theta * adam.decoupled) * adam.lr;
}
