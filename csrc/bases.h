// The formulas of the fused bases, written once for scalars, vectors and CUDA.
//
// Included inside the namespace of an instruction set, or of CUDA, after arithmetic.h, imbsam.h and
// a square_root. V and S are those of arithmetic.h. A base has
//   Formula    the scalars of a step in the arithmetic dtype. lr and grad_factor come from whoever
//              calls: grad_factor undoes the loss scale, and is negative to maximize;
//   fill_own   which sets the others, from UpdateSettings::own;
//   OfTensor   what is computed once a tensor, by of_tensor, from the steps that it took, this one
//              included; nothing where the base has no counts;
//   stepped    the new theta. state[k] is list k of kBases and becomes its new value; has[k] is
//              whether it is there.
#pragma once

template <Base kBase, class S>
struct Formula;

template <Base kBase, class S>
struct OfTensor {};

template <Base kBase, class S>
IMBSAM_INLINE void of_tensor(OfTensor<kBase, S>&, const Formula<kBase, S>&, int64_t) {}

// ---------------------------------------------------------------- SGD

template <class S>
struct Formula<Base::sgd, S> {
  S lr, grad_factor, momentum, one_minus_dampening, weight_decay;
  bool nesterov;
};

template <class S>
IMBSAM_INLINE void fill_own(Formula<Base::sgd, S>& sgd, const double* own) {
  sgd.momentum = (S)own[0];
  sgd.one_minus_dampening = (S)(1 - own[1]);
  sgd.weight_decay = (S)own[2];
  sgd.nesterov = own[3] != 0;
}

// d = g + weight_decay theta;  m <- momentum m + (1 - dampening) d;
// theta - lr m, nesterov: theta - lr (d + momentum m)
template <class V, class S>
IMBSAM_INLINE V stepped(const Formula<Base::sgd, S>& sgd, const OfTensor<Base::sgd, S>&, V theta,
                        V g, V (&state)[1], const bool (&has)[1]) {
  const V d = g * sgd.grad_factor + theta * sgd.weight_decay;
  if (!has[0]) return theta - d * sgd.lr;
  const V m = state[0] * sgd.momentum + d * sgd.one_minus_dampening;
  state[0] = m;
  return theta - (sgd.nesterov ? d + m * sgd.momentum : m) * sgd.lr;
}

// ---------------------------------------------------------------- Adam and AdamW

template <class S>
struct Formula<Base::adam, S> {
  S lr, grad_factor, beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  S coupled, decoupled;  // the weight decay in the gradient (Adam) and beside it (AdamW)
  double exact_beta1, exact_beta2;
};

template <class S>
IMBSAM_INLINE void fill_own(Formula<Base::adam, S>& adam, const double* own) {
  adam.exact_beta1 = own[0];
  adam.exact_beta2 = own[1];
  adam.beta1 = (S)own[0];
  adam.one_minus_beta1 = (S)(1 - own[0]);
  adam.beta2 = (S)own[1];
  adam.one_minus_beta2 = (S)(1 - own[1]);
  adam.eps = (S)own[2];
  adam.coupled = own[4] != 0 ? S(0) : (S)own[3];
  adam.decoupled = own[4] != 0 ? (S)own[3] : S(0);
}

// What m and the root of v are multiplied by, for they began as 0: 1 / (1 - beta1^step) and
// 1 / sqrt(1 - beta2^step)
template <class S>
struct OfTensor<Base::adam, S> {
  S m, root_v;
};

template <class S>
IMBSAM_INLINE void of_tensor(OfTensor<Base::adam, S>& corrections,
                             const Formula<Base::adam, S>& adam, int64_t step) {
  corrections.m = (S)(1 / (1 - power(adam.exact_beta1, step)));
  corrections.root_v = (S)(1 / sqrt(1 - power(adam.exact_beta2, step)));
}

// d = g + coupled theta;  m <- beta1 m + (1 - beta1) d;  v <- beta2 v + (1 - beta2) d^2;
// v_max <- max(v_max, v), which then stands for v;
// theta - lr (m^ / (sqrt(v^) + eps) + decoupled theta), ^ for the bias corrections
template <class V, class S>
IMBSAM_INLINE V stepped(const Formula<Base::adam, S>& adam,
                        const OfTensor<Base::adam, S>& corrections, V theta, V g, V (&state)[3],
                        const bool (&has)[3]) {
  const V d = g * adam.grad_factor + theta * adam.coupled;
  const V m = state[0] * adam.beta1 + d * adam.one_minus_beta1;
  const V v = state[1] * adam.beta2 + d * d * adam.one_minus_beta2;
  const V bound = has[2] ? larger(state[2], v) : v;
  state[0] = m;
  state[1] = v;
  state[2] = bound;
  const V root_v = square_root(bound);
  const V step = (m * corrections.m) / (root_v * corrections.root_v + adam.eps);
  return theta - (step + theta * adam.decoupled) * adam.lr;
}

// ---------------------------------------------------------------- RMSprop

template <class S>
struct Formula<Base::rmsprop, S> {
  S lr, grad_factor, alpha, one_minus_alpha, eps, weight_decay, momentum;
  bool is_near;  // 1 - alpha < 1/2
};

template <class S>
IMBSAM_INLINE void fill_own(Formula<Base::rmsprop, S>& rmsprop, const double* own) {
  rmsprop.alpha = (S)own[0];
  rmsprop.one_minus_alpha = (S)(1 - own[0]);
  rmsprop.is_near = 1 - own[0] < 0.5;
  rmsprop.eps = (S)own[1];
  rmsprop.weight_decay = (S)own[2];
  rmsprop.momentum = (S)own[3];
}

// d = g + weight_decay theta;  v <- alpha v + (1 - alpha) d^2;  g_avg <- alpha g_avg + (1 - alpha) d,
// from the nearer of its ends;  u = d / (sqrt(v - g_avg^2) + eps);  m <- momentum m + u;
// theta - lr m. Without g_avg that is 0, without m it is u.
template <class V, class S>
IMBSAM_INLINE V stepped(const Formula<Base::rmsprop, S>& rmsprop, const OfTensor<Base::rmsprop, S>&,
                        V theta, V g, V (&state)[3], const bool (&has)[3]) {
  const V d = g * rmsprop.grad_factor + theta * rmsprop.weight_decay;
  const V v = state[0] * rmsprop.alpha + d * d * rmsprop.one_minus_alpha;
  state[0] = v;
  V spread = v;
  if (has[2]) {
    const V apart = d - state[2];
    const V g_avg = rmsprop.is_near ? state[2] + apart * rmsprop.one_minus_alpha
                                    : d - apart * rmsprop.alpha;
    state[2] = g_avg;
    spread = v - g_avg * g_avg;
  }
  V direction = d / (square_root(spread) + rmsprop.eps);
  if (has[1]) {
    direction = state[1] * rmsprop.momentum + direction;
    state[1] = direction;
  }
  return theta - direction * rmsprop.lr;
}
