// split_cross_entropy and its backward: one block a row of logits, 16-byte access from the first
// aligned element on.

#undef NDEBUG  // a target outside the classes is an error of the caller, in every build
#include <assert.h>

#include "cross_entropy.cuh"

namespace imbsam {
namespace cuda {
namespace {

// The label of a counted row, or -1 for one that is ignored.
__device__ __forceinline__ int label_of(int64_t target, const CrossEntropySettings& s) {
  if (target == s.ignore_index) return -1;
  assert(target >= 0 && target < s.classes && "targets: expected 0 to classes - 1 or ignore_index");
  return (int)target;
}

// bytes: N·K read. Writes lse, and the loss of each row before plain and sharp, 0 if ignored.
template <class T, bool kSmooth>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T, kSmooth>)
    row_losses_kernel(const CrossEntropySettings s, const T* logits, const int64_t* targets,
                      const typename Arithmetic<T>::S* class_weight,
                      typename Arithmetic<T>::S* lse, double* losses) {
  typedef typename Arithmetic<T>::S S;
  const int64_t i = blockIdx.x;
  const T* row = logits + i * s.row_stride;
  RowSums<T, kSmooth> sums = thread_sums<T, kSmooth>(row, (int)s.classes, class_weight);
  const S max = block_reduce<kRowThreads>(sums.max, -(S)INFINITY,
                                          [](S a, S b) { return largest(a, b); });
  sums.raise(max);
  double of_row[kSmooth ? 3 : 1] = {(double)sums.exp_sum};
  if constexpr (kSmooth) {
    of_row[1] = sums.weighted;
    of_row[2] = sums.weights;
  }
  sum_for_first_thread<kRowThreads>(of_row);
  if (threadIdx.x != 0) return;

  const double log_sum = log(of_row[0]);
  lse[2 * i] = max;
  lse[2 * i + 1] = (S)log_sum;
  const int y = label_of(targets[i], s);
  double loss = 0;
  if (y >= 0) {
    const double hard = (1 - s.label_smoothing) * (class_weight ? (double)class_weight[y] : 1.0);
    loss = hard * ((double)max - (double)widened(row[y]) + log_sum);
    if constexpr (kSmooth)
      loss += s.label_smoothing / (double)s.classes * (of_row[2] * log_sum - of_row[1]);
  }
  losses[i] = loss;
}

// Adds the rows' losses. One of several blocks leaves its sums where the first of its rows had
// their losses, for sum_blocks_kernel.
template <class S>
__global__ void __launch_bounds__(kRowThreads)
    sum_losses_kernel(int64_t rows, int64_t ignore_index, double* losses, const int64_t* targets,
                      const S* plain, const S* sharp, double batch_size, S* head, S* tail, S* b) {
  const int64_t first = (int64_t)blockIdx.x * kRowsSummed;
  const int64_t end = blockIdx.x + 1 == gridDim.x ? rows : first + kRowsSummed;
  LossSums sums;
  for (int64_t i = first + threadIdx.x; i < end; i += kRowThreads) {
    const int64_t y = targets[i];
    if (y == ignore_index) continue;
    sums.counted += 1;
    // A row that carries no weight counts nothing whatever its loss is.
    if (plain[y] != 0) sums.head += (double)plain[y] * losses[i];
    if (sharp[y] != 0) sums.tail += (double)sharp[y] * losses[i];
  }
  sums.add_up();  // and so all losses are read
  if (threadIdx.x != 0) return;
  if (gridDim.x == 1) {
    sums.write(batch_size, head, tail, b);
  } else {
    losses[first] = sums.head;
    losses[first + 1] = sums.tail;
    losses[first + 2] = sums.counted;
  }
}

// One block: adds what the blocks of sum_losses_kernel left.
template <class S>
__global__ void __launch_bounds__(kRowThreads)
    sum_blocks_kernel(int blocks, const double* losses, double batch_size, S* head, S* tail, S* b) {
  LossSums sums;
  for (int i = threadIdx.x; i < blocks; i += kRowThreads) {
    const double* left = losses + (int64_t)i * kRowsSummed;
    sums.head += left[0];
    sums.tail += left[1];
    sums.counted += left[2];
  }
  sums.add_up();
  if (threadIdx.x == 0) sums.write(batch_size, head, tail, b);
}

// What the gradient of a row takes, the same for all its elements.
template <class S>
struct RowGradient {
  S max, log_sum;
  S soft;    // times softmax; 0 where the row has no weight
  S smooth;  // times w_k
  S hard;    // at the label
  int y;
  bool zero;
};

template <class S>
struct BackwardArguments {
  CrossEntropySettings s;
  const S *grad_head, *grad_tail;  // null for zero
  const int64_t* targets;
  const S *lse, *b, *plain, *sharp, *class_weight;
  const double* weight_sum;
};

template <class S>
__device__ RowGradient<S> row_gradient(const BackwardArguments<S>& a, int64_t i) {
  const int y = label_of(a.targets[i], a.s);
  double row = 0;
  if (y >= 0) {
    if (a.grad_head) row += (double)*a.grad_head * (double)a.plain[y];
    if (a.grad_tail) row += (double)*a.grad_tail * (double)a.sharp[y];
    row /= fmax((double)*a.b, 1.0);
  }
  RowGradient<S> g = {};
  g.zero = row == 0;
  if (g.zero) return g;
  const double w = a.class_weight ? (double)a.class_weight[y] : 1.0;
  const double smooth = a.s.label_smoothing / (double)a.s.classes;
  const double weight_sum = a.weight_sum ? *a.weight_sum : (double)a.s.classes;
  const double hard = (1 - a.s.label_smoothing) * w;
  g.max = a.lse[2 * i];
  g.log_sum = a.lse[2 * i + 1];
  g.soft = (S)(row * (hard + smooth * weight_sum));
  g.smooth = (S)(row * smooth);
  g.hard = (S)(row * hard);
  g.y = y;
  return g;
}

// bytes: N·K read, N·K written; rows without weight are only written.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks<T, false>)
    row_gradients_kernel(const BackwardArguments<typename Arithmetic<T>::S> a,
                         const T* __restrict__ logits, T* __restrict__ grad_logits) {
  typedef typename Arithmetic<T>::S S;
  constexpr int lanes = Pack<T>::kLanes;
  const int64_t i = blockIdx.x;
  const int classes = (int)a.s.classes, stride = blockDim.x;
  const T* z = logits + i * a.s.row_stride;
  T* dz = grad_logits + i * a.s.classes;
  // Bytes by which packs of dz's alignment begin after a boundary in z.
  const unsigned after = (unsigned)((reinterpret_cast<uintptr_t>(z) - reinterpret_cast<uintptr_t>(dz)) % 16);

  __shared__ RowGradient<S> shared;
  if (threadIdx.x == 0) shared = row_gradient(a, i);
  __syncthreads();
  const RowGradient<S> g = shared;

  if (g.zero) {
    write_zeros(dz, classes);
    return;
  }
  const S* w = g.smooth != 0 ? a.class_weight : nullptr;
  const auto gradient = [&](T z_k, int k) {
    S d = exp_<T>(widened(z_k) - g.max - g.log_sum) * g.soft;
    d -= w ? g.smooth * w[k] : g.smooth;
    return narrowed<T>(k == g.y ? d - g.hard : d);
  };
  const RowLayout<T> layout(dz, classes, after != 0);
  const auto read = [&](int k) { return after ? load_across(z + k, after) : Whole().load(z + k); };
  const auto write = [&](Pack<T> pack, int k) {
#pragma unroll
    for (int j = 0; j < lanes; ++j) pack.lanes[j] = gradient(pack.lanes[j], k + j);
    Whole().store(dz + k, pack);
  };
  int v = threadIdx.x;
#pragma unroll 1
  for (; v + stride < layout.packs; v += 2 * stride) {  // two packs under way
    const int first = layout.first(v), second = layout.first(v + stride);
    const Pack<T> a_pack = read(first), b_pack = read(second);
    write(a_pack, first);
    write(b_pack, second);
  }
  if (v < layout.packs) write(read(layout.first(v)), layout.first(v));
#pragma unroll 1
  for (int j = threadIdx.x; j < layout.singles; j += stride) {
    const int k = layout.single(j);
    dz[k] = gradient(z[k], k);
  }
}

}  // namespace

void split_cross_entropy(DType dtype, const CrossEntropySettings& s, const void* logits,
                         const int64_t* targets, const ClassWeights& weights, double batch_size,
                         double* losses, void* head, void* tail, void* b, void* lse,
                         const Stream& stream) {
  constexpr const char* op = "split_cross_entropy";
  check_limits(op, s);
  const OnDevice on_device(op, stream.device);
  with_type(dtype, [&](auto type) {
    typedef typename decltype(type)::T T;
    typedef typename Arithmetic<T>::S S;
    if (s.rows)
      launch(op, s.label_smoothing > 0 ? row_losses_kernel<T, true> : row_losses_kernel<T, false>,
             (int)s.rows, row_threads<T>(s.classes), stream, s, as<T>(logits), targets,
             as<S>(weights.class_weight), static_cast<S*>(lse), losses);
    const int blocks = (int)std::max<int64_t>(1, s.rows / kRowsSummed);
    launch(op, sum_losses_kernel<S>, blocks, kRowThreads, stream, s.rows, s.ignore_index, losses,
           targets, as<S>(weights.plain), as<S>(weights.sharp), batch_size,
           static_cast<S*>(head), static_cast<S*>(tail), static_cast<S*>(b));
    if (blocks > 1)
      launch(op, sum_blocks_kernel<S>, 1, kRowThreads, stream, blocks, losses, batch_size,
             static_cast<S*>(head), static_cast<S*>(tail), static_cast<S*>(b));
  });
}

void split_cross_entropy_backward(DType dtype, const CrossEntropySettings& s,
                                  const void* grad_head, const void* grad_tail,
                                  const void* logits, const int64_t* targets, const void* lse,
                                  const void* b, const ClassWeights& weights,
                                  const double* weight_sum, void* grad_logits,
                                  const Stream& stream) {
  constexpr const char* op = "split_cross_entropy_backward";
  check_limits(op, s);
  if (s.rows == 0) return;
  const OnDevice on_device(op, stream.device);
  with_type(dtype, [&](auto type) {
    typedef typename decltype(type)::T T;
    typedef typename Arithmetic<T>::S S;
    const BackwardArguments<S> arguments = {
        s, as<S>(grad_head), as<S>(grad_tail), targets, as<S>(lse), as<S>(b),
        as<S>(weights.plain), as<S>(weights.sharp), as<S>(weights.class_weight), weight_sum};
    launch(op, row_gradients_kernel<T>, (int)s.rows, row_threads<T>(s.classes), stream, arguments,
           as<T>(logits), static_cast<T*>(grad_logits));
  });
}

}  // namespace cuda
}  // namespace imbsam
