// split_soft_cross_entropy and its backward: one block a row of logits and of q. The maximum and
// the sum of exponentials come from packs of 16 bytes. Where q takes part, which may be of another
// size and alignment than the logits, and lists of class weights with it, a thread takes single
// elements and a warp neighbours.

#include "cross_entropy.cuh"

namespace imbsam {
namespace cuda {
namespace {

// What the backward needs of a row, and where: kWeighted and kMass for plain and for sharp.
enum RowNumber { kMax, kLogSum, kWeighted, kMass = kWeighted + 2, kRowNumbers = kMass + 2 };

constexpr int kLossUnroll = 8;      // elements of a row that a thread adds up before float64
constexpr int kGradientUnroll = 4;  // elements of a row that a thread has under way

// The first of `unroll` elements of a thread, 32 apart: the distance to the others is a constant of
// the loads.
template <int unroll>
__device__ __forceinline__ int first_of() {
  return (int)(threadIdx.x / 32 * (32 * unroll) + threadIdx.x % 32);
}

template <class S>
struct Labels {
  const S* q;  // (rows, classes), unit stride along classes
  int64_t stride;
  const S *plain, *sharp, *class_weight;  // class_weight null: 1

  __device__ __forceinline__ S weight(int k) const { return class_weight ? class_weight[k] : S(1); }
};

// Sums over a row: part 0, where a_k is q_k plain_k, and part 1, where it is q_k sharp_k.
template <class V>
struct PartSums {
  V dot[2] = {};       // sum_k a_k w_k (z_k - max)
  V weighted[2] = {};  // sum_k a_k w_k
  V mass[2] = {};      // sum_k a_k

  __device__ __forceinline__ void add(int part, V share, V w, V x) {
    if (share == 0) return;  // counts nothing whatever its logit is
    dot[part] += share * w * x;
    weighted[part] += share * w;
    mass[part] += share;
  }
  template <class S>
  __device__ __forceinline__ void add(const PartSums<S>& some) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      dot[part] += (double)some.dot[part];
      weighted[part] += (double)some.weighted[part];
      mass[part] += (double)some.mass[part];
    }
  }
};

// What one thread adds to `sums` of a row; returns whether an element of q is not 0. Few additions
// are in float64, of which many GPUs do two a clock and multiprocessor.
template <class T, class S>
__device__ __forceinline__ bool add_labels(PartSums<double>& sums, const T* row, const S* q,
                                           const Labels<S>& labels, int classes, S max) {
  bool found = false;
#pragma unroll 1
  for (int first = first_of<kLossUnroll>(); first < classes; first += kLossUnroll * blockDim.x) {
    S label[kLossUnroll];
#pragma unroll
    for (int u = 0; u < kLossUnroll; ++u) {
      const int k = first + u * 32;
      label[u] = k < classes ? q[k] : S(0);
    }
    PartSums<S> some;
#pragma unroll
    for (int u = 0; u < kLossUnroll; ++u) {
      if (label[u] == 0) continue;
      const int k = first + u * 32;
      const S w = labels.weight(k), x = widened(row[k]) - max;
      some.add(0, label[u] * labels.plain[k], w, x);
      some.add(1, label[u] * labels.sharp[k], w, x);
      found = true;
    }
    sums.add(some);
  }
  return found;
}

// bytes: 2 N·K read; logits where q is not 0 once more, from the cache. losses: for each row head,
// tail and whether it counts.
template <class T, bool kSmooth>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T, kSmooth>)
    soft_row_losses_kernel(const CrossEntropySettings s, const T* logits,
                           const Labels<typename Arithmetic<T>::S> labels,
                           typename Arithmetic<T>::S* row_numbers, double* losses) {
  typedef typename Arithmetic<T>::S S;
  const int64_t i = blockIdx.x;
  const int classes = (int)s.classes;
  const T* row = logits + i * s.row_stride;
  RowSums<T, kSmooth> all = thread_sums<T, kSmooth>(row, classes, labels.class_weight);
  const S max = block_reduce<kRowThreads>(all.max, -(S)INFINITY,
                                          [](S a, S b) { return largest(a, b); });
  all.raise(max);
  PartSums<double> of;
  const bool mine = add_labels(of, row, labels.q + i * labels.stride, labels, classes, max);
  const bool counted = __syncthreads_or(mine);

  double sums[kSmooth ? 9 : 7] = {(double)all.exp_sum, of.dot[0],  of.dot[1], of.weighted[0],
                                  of.weighted[1],      of.mass[0], of.mass[1]};
  if constexpr (kSmooth) {
    sums[7] = all.weighted;
    sums[8] = all.weights;
  }
  sum_for_first_thread<kRowThreads>(sums);
  if (threadIdx.x != 0) return;

  const double log_sum = log(sums[0]);
  double smoothed = 0;  // s / K sum_j w_j (log_sum - z_j + max)
  if constexpr (kSmooth)
    smoothed = s.label_smoothing / (double)classes * (sums[8] * log_sum - sums[7]);
  S* numbers = row_numbers + i * kRowNumbers;
  numbers[kMax] = max;
  numbers[kLogSum] = (S)log_sum;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const double dot = sums[1 + part], weighted = sums[3 + part], mass = sums[5 + part];
    numbers[kWeighted + part] = (S)weighted;
    numbers[kMass + part] = (S)mass;
    const double loss = (1 - s.label_smoothing) * (weighted * log_sum - dot) + mass * smoothed;
    losses[3 * i + part] = mass == 0 ? 0 : loss;  // whatever it is
  }
  losses[3 * i + 2] = counted;
}

// Adds the losses of rows that are `apart` from each other. One of several blocks leaves its sums
// where the first of its rows had their losses, for one more launch.
template <class S>
__global__ void __launch_bounds__(kRowThreads)
    sum_soft_losses_kernel(int64_t rows, int64_t apart, double* losses, double batch_size, S* head,
                           S* tail, S* b) {
  const int64_t first = (int64_t)blockIdx.x * kRowsSummed;
  const int64_t end = blockIdx.x + 1 == gridDim.x ? rows : first + kRowsSummed;
  LossSums sums;
  for (int64_t i = first + threadIdx.x; i < end; i += kRowThreads) {
    const double* of_row = losses + 3 * apart * i;
    sums.head += of_row[0];
    sums.tail += of_row[1];
    sums.counted += of_row[2];
  }
  sums.add_up();  // and so all losses are read
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    sums.write(batch_size, head, tail, b);
  } else {
    double* left = losses + 3 * apart * first;
    left[0] = sums.head;
    left[1] = sums.tail;
    left[2] = sums.counted;
  }
}

template <class S>
struct SoftBackward {
  CrossEntropySettings s;
  const S *grad_head, *grad_tail;  // null for zero
  Labels<S> labels;
  const S *row_numbers, *b;
  const double* weight_sum;
};

// What the gradient of a row takes, the same for all its elements.
template <class S>
struct SoftGradient {
  S max, log_sum;
  S soft;                // times softmax
  S smooth;              // times w_k
  S of_plain, of_sharp;  // times q_k w_k plain_k, and sharp_k
  bool zero;             // no part with a gradient has weight in the row
};

template <class S>
__device__ SoftGradient<S> soft_gradient(const SoftBackward<S>& a, int64_t i) {
  const S* numbers = a.row_numbers + i * kRowNumbers;
  const double b = fmax((double)*a.b, 1.0);
  const S* gradients[2] = {a.grad_head, a.grad_tail};
  double factors[2] = {}, weighted = 0, mass = 0;
  SoftGradient<S> g = {};
  g.zero = true;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    if (!gradients[part]) continue;
    factors[part] = (double)*gradients[part] / b;
    const double of_row = (double)numbers[kMass + part];
    if (factors[part] == 0 || of_row == 0) continue;  // sums without a gradient may be infinite
    g.zero = false;
    mass += factors[part] * of_row;
    weighted += factors[part] * (double)numbers[kWeighted + part];
  }
  const double hard = 1 - a.s.label_smoothing;
  const double smooth = a.s.label_smoothing / (double)a.s.classes * mass;
  const double weight_sum = a.weight_sum ? *a.weight_sum : (double)a.s.classes;
  g.max = numbers[kMax];
  g.log_sum = numbers[kLogSum];
  g.soft = (S)(hard * weighted + smooth * weight_sum);
  g.smooth = (S)smooth;
  g.of_plain = (S)(hard * factors[0]);
  g.of_sharp = (S)(hard * factors[1]);
  return g;
}

// bytes: 2 N·K read, N·K written; rows without weight are only written.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T, false>)
    soft_gradients_kernel(const SoftBackward<typename Arithmetic<T>::S> a, const T* logits,
                          T* grad_logits) {
  typedef typename Arithmetic<T>::S S;
  const int64_t i = blockIdx.x;
  const int classes = (int)a.s.classes;
  const Labels<S>& labels = a.labels;
  const T* z = logits + i * a.s.row_stride;
  const S* q = labels.q + i * labels.stride;
  T* dz = grad_logits + i * a.s.classes;

  __shared__ SoftGradient<S> shared;
  if (threadIdx.x == 0) shared = soft_gradient(a, i);
  __syncthreads();
  const SoftGradient<S> g = shared;
  if (g.zero) {
    write_zeros(dz, classes);
    return;
  }
#pragma unroll 1
  for (int first = first_of<kGradientUnroll>(); first < classes;
       first += kGradientUnroll * blockDim.x) {
    T logit[kGradientUnroll];
    S label[kGradientUnroll];
#pragma unroll
    for (int u = 0; u < kGradientUnroll; ++u) {
      const int k = first + u * 32;
      logit[u] = k < classes ? z[k] : T(0.0f);
      label[u] = k < classes ? q[k] : S(0);
    }
#pragma unroll
    for (int u = 0; u < kGradientUnroll; ++u) {
      const int k = first + u * 32;
      if (k >= classes) break;
      const S w = labels.weight(k);
      S d = exp_<T>(widened(logit[u]) - g.max - g.log_sum) * g.soft - g.smooth * w;
      if (label[u] != 0)
        d -= label[u] * (w * (g.of_plain * labels.plain[k] + g.of_sharp * labels.sharp[k]));
      dz[k] = narrowed<T>(d);
    }
  }
}

template <class S>
Labels<S> labels_of(const void* q, int64_t q_stride, const ClassWeights& weights) {
  return {as<S>(q), q_stride, as<S>(weights.plain), as<S>(weights.sharp),
          as<S>(weights.class_weight)};
}

}  // namespace

void split_soft_cross_entropy(DType dtype, const CrossEntropySettings& s, const void* logits,
                              const void* q, int64_t q_stride, const ClassWeights& weights,
                              double batch_size, double* losses, void* head, void* tail, void* b,
                              void* row_numbers, const Stream& stream) {
  constexpr const char* op = "split_soft_cross_entropy";
  check_limits(op, s);
  const OnDevice on_device(op, stream.device);
  with_type(dtype, [&](auto type) {
    typedef typename decltype(type)::T T;
    typedef typename Arithmetic<T>::S S;
    if (s.rows)
      launch(op,
             s.label_smoothing > 0 ? soft_row_losses_kernel<T, true>
                                   : soft_row_losses_kernel<T, false>,
             (int)s.rows, row_threads<S>(s.classes), stream, s, as<T>(logits),
             labels_of<S>(q, q_stride, weights), static_cast<S*>(row_numbers), losses);
    const auto sum = [&](int blocks, int64_t rows, int64_t apart) {
      launch(op, sum_soft_losses_kernel<S>, blocks, kRowThreads, stream, rows, apart, losses,
             batch_size, static_cast<S*>(head), static_cast<S*>(tail), static_cast<S*>(b));
    };
    const int blocks = (int)std::max<int64_t>(1, s.rows / kRowsSummed);
    sum(blocks, s.rows, 1);
    if (blocks > 1) sum(1, blocks, kRowsSummed);
  });
}

void split_soft_cross_entropy_backward(DType dtype, const CrossEntropySettings& s,
                                       const void* grad_head, const void* grad_tail,
                                       const void* logits, const void* q, int64_t q_stride,
                                       const void* row_numbers, const void* b,
                                       const ClassWeights& weights, const double* weight_sum,
                                       void* grad_logits, const Stream& stream) {
  constexpr const char* op = "split_soft_cross_entropy_backward";
  check_limits(op, s);
  if (s.rows == 0) return;
  const OnDevice on_device(op, stream.device);
  with_type(dtype, [&](auto type) {
    typedef typename decltype(type)::T T;
    typedef typename Arithmetic<T>::S S;
    const SoftBackward<S> arguments = {
        s, as<S>(grad_head), as<S>(grad_tail), labels_of<S>(q, q_stride, weights),
        as<S>(row_numbers), as<S>(b), weight_sum};
    launch(op, soft_gradients_kernel<T>, (int)s.rows, row_threads<S>(s.classes), stream,
           arguments, as<T>(logits), static_cast<T*>(grad_logits));
  });
}

}  // namespace cuda
}  // namespace imbsam
