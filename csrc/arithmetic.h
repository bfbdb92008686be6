// The per-element arithmetic of the optimizer phases, written once for scalars and vectors; that of
// the updates is in bases.h.
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

// base^exponent by squaring: multiplications alone, for the same bits everywhere
IMBSAM_INLINE double power(double base, int64_t exponent) {
  double product = 1;
  for (; exponent > 0; exponent >>= 1, base *= base)
    if (exponent & 1) product *= base;
  return product;
}

// The larger one; not-a-number, where one of them is
template <class V>
IMBSAM_INLINE V larger(V a, V b) {
  return ((a >= b) | (a != a)) ? a : b;
}
