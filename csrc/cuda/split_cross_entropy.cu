// split_cross_entropy and its backward: one block a row of logits, 16-byte access from the first
// aligned element on.

#undef NDEBUG  // a target outside the classes is an error of the caller, in every build
#include <assert.h>
#include <math.h>

#include "launch.h"
#include "multi_tensor.cuh"
#include "reduce.cuh"

#if defined(__CUDACC__)
static __device__ __forceinline__ float exp2_approx(float y) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
  return power;
}
#endif

namespace imbsam {
namespace cuda {
namespace {

constexpr int kRowThreads = 512;  // of the largest block; small rows take fewer
constexpr int kRowUnroll = 4;     // packs of a row that a thread has under way

// Blocks a multiprocessor must hold: double and smoothing need the registers of the second one.
template <class T, bool kSmooth>
constexpr int kRowBlocks = kSmooth || sizeof(T) == 8 ? 1 : 2;

// e^x for data of type T. For bfloat16 and float16, of which a GPU reads so many that instructions
// count, the hardware's 2^y, y = x log2(e): off by its 2 ulp and by a rounding of y. Sums of
// exponentials and gradients weigh that by e^x, which makes up for a large y. Plain torch's float
// for float data.
template <class T>
__device__ __forceinline__ float exp_(float x) {
  if (sizeof(T) == 2) return exp2_approx(x * 1.4426950408889634f);
  return expf(x);
}
template <class T>
__device__ __forceinline__ double exp_(double x) { return exp(x); }
__device__ __forceinline__ float largest(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double largest(double a, double b) { return fmax(a, b); }

// What a row is shifted by before exp: its maximum, but 0 where every logit is -inf so far.
template <class S>
__device__ __forceinline__ S shift_of(S max) {
  return max == -(S)INFINITY ? S(0) : max;
}

// The sums over the elements of a row that one thread has met so far.
template <class T, bool kSmooth>
struct RowSums {
  typedef typename Arithmetic<T>::S S;
  S max = -(S)INFINITY;
  S exp_sum = 0;                     // sum exp(z - shift)
  double weighted = 0, weights = 0;  // sum w (z - shift) and sum w, with smoothing only

  __device__ __forceinline__ void raise(S higher) {
    const S shift = shift_of(higher);
    exp_sum *= exp_<T>(max - shift);
    if (kSmooth) weighted += weights * ((double)shift_of(max) - (double)shift);
    max = higher;
  }

  // `largest` passes not-a-number over; exp does not.
  template <int n>
  __device__ __forceinline__ void add(const S (&z)[n]) {
    S higher = max;
#pragma unroll
    for (int j = 0; j < n; ++j) higher = largest(higher, z[j]);
    if (higher > max) raise(higher);
    const S shift = shift_of(max);
    S sum = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) sum += exp_<T>(z[j] - shift);
    exp_sum += sum;
  }

  // w: the weights of these classes, null for 1. After `add` of the same elements.
  template <int n>
  __device__ __forceinline__ void add_weighted(const S (&z)[n], const S* w) {
    if (!kSmooth) return;
    const S shift = shift_of(max);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const double weight = w ? (double)w[j] : 1.0;
      weighted += weight * ((double)z[j] - (double)shift);
      weights += weight;
    }
  }
};

// A row as packs from its first aligned element on, and single elements before and after them.
template <class T>
struct RowLayout {
  int before, packs, singles;

  // `apart`: another row is read beside this one whose packs reach across two of its own, so that
  // the first and the last pack of this row are left to single elements.
  __device__ __forceinline__ RowLayout(const T* row, int classes, bool apart = false) {
    constexpr int lanes = Pack<T>::kLanes;
    const int to_aligned = (int)((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
    before = to_aligned + (apart ? lanes : 0);
    before = before < classes ? before : classes;
    const int whole = (classes - before) / lanes - (apart ? 1 : 0);
    packs = whole > 0 ? whole : 0;
    singles = classes - packs * lanes;
  }
  __device__ __forceinline__ int first(int pack) const { return before + pack * Pack<T>::kLanes; }
  __device__ __forceinline__ int single(int i) const {
    return i < before ? i : i + packs * Pack<T>::kLanes;
  }
};

template <class T>
__device__ __forceinline__ void load_pack(typename Arithmetic<T>::S (&z)[Pack<T>::kLanes],
                                          const T* p) {
  const Pack<T> pack = Whole().load(p);
#pragma unroll
  for (int j = 0; j < Pack<T>::kLanes; ++j) z[j] = widened(pack.lanes[j]);
}

// The 16 bytes at p, `after` bytes behind a boundary, from the two aligned packs that they lie in.
template <class T>
__device__ __forceinline__ Pack<T> load_across(const T* p, unsigned after) {
  const uint4* aligned = reinterpret_cast<const uint4*>(reinterpret_cast<uintptr_t>(p) - after);
  const uint4 low = aligned[0], high = aligned[1];
  unsigned words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 6; ++i) words[i] = after & 8 ? words[i + 2] : words[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) words[i] = after & 4 ? words[i + 1] : words[i];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], 8 * (after & 3));
  Pack<T> pack;
  memcpy(&pack, words, sizeof(pack));
  return pack;
}

template <class T, bool kSmooth>
__device__ __forceinline__ RowSums<T, kSmooth> thread_sums(
    const T* row, int classes, const typename Arithmetic<T>::S* w) {
  typedef typename Arithmetic<T>::S S;
  constexpr int lanes = Pack<T>::kLanes;
  const RowLayout<T> layout(row, classes);
  const int stride = blockDim.x;
  RowSums<T, kSmooth> sums;
  // Every thread has at most one element outside of packs; its load begins here.
  const bool has_single = (int)threadIdx.x < layout.singles;
  const int k = has_single ? layout.single(threadIdx.x) : 0;
  const S single[1] = {has_single ? widened(row[k]) : -(S)INFINITY};
  const auto add = [&](int v, auto is_last) {
    constexpr bool kLast = decltype(is_last)::value;
    S z[kRowUnroll][lanes];
#pragma unroll
    for (int u = 0; u < kRowUnroll; ++u) {
      if (!kLast || v + u * stride < layout.packs) {
        load_pack<T>(z[u], row + layout.first(v + u * stride));
      } else {
#pragma unroll
        for (int j = 0; j < lanes; ++j) z[u][j] = -(S)INFINITY;
      }
    }
    sums.add(reinterpret_cast<S(&)[kRowUnroll * lanes]>(z));
    if constexpr (kSmooth) {
#pragma unroll
      for (int u = 0; u < kRowUnroll; ++u)
        if (!kLast || v + u * stride < layout.packs)
          sums.add_weighted(z[u], w ? w + layout.first(v + u * stride) : nullptr);
    }
  };
  int v = threadIdx.x;
  for (; v + (kRowUnroll - 1) * stride < layout.packs; v += kRowUnroll * stride)
    add(v, std::false_type());
  if (v < layout.packs) add(v, std::true_type());
  if (has_single) {
    sums.add(single);
    sums.add_weighted(single, w ? w + k : nullptr);
  }
  return sums;
}

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
  const S max = block_reduce(sums.max, -(S)INFINITY, [](S a, S b) { return largest(a, b); });
  sums.raise(max);
  const double exp_sum = block_sum((double)sums.exp_sum);
  const double weighted = kSmooth ? block_sum(sums.weighted) : 0;
  const double weights = kSmooth ? block_sum(sums.weights) : 0;
  if (threadIdx.x != 0) return;

  const double log_sum = log(exp_sum);
  lse[2 * i] = max;
  lse[2 * i + 1] = (S)log_sum;
  const int y = label_of(targets[i], s);
  double loss = 0;
  if (y >= 0) {
    const double hard = (1 - s.label_smoothing) * (class_weight ? (double)class_weight[y] : 1.0);
    loss = hard * ((double)max - (double)widened(row[y]) + log_sum);
    if (kSmooth) loss += s.label_smoothing / (double)s.classes * (weights * log_sum - weighted);
  }
  losses[i] = loss;
}

constexpr int kRowsSummed = 4096;  // by a block; by the last one up to twice as many

// Sums a block of rows, in a fixed order.
struct LossSums {
  double head = 0, tail = 0, counted = 0;

  __device__ __forceinline__ void add_up() {
    head = block_sum(head);
    tail = block_sum(tail);
    counted = block_sum(counted);
  }
  template <class S>
  __device__ __forceinline__ void write(double batch_size, S* head_at, S* tail_at, S* b) const {
    const double divisor = batch_size < 0 ? counted : batch_size;
    *head_at = (S)(head / fmax(divisor, 1.0));
    *tail_at = (S)(tail / fmax(divisor, 1.0));
    *b = (S)divisor;
  }
};

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
    const RowLayout<T> layout(dz, classes);
    for (int v = threadIdx.x; v < layout.packs; v += stride)
      Whole().store(dz + layout.first(v), Pack<T>{});
    for (int j = threadIdx.x; j < layout.singles; j += stride) dz[layout.single(j)] = T(0.0f);
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

// Whole warps, as many as have about kRowUnroll packs of a row each.
template <class T>
int row_threads(int64_t classes) {
  const int64_t useful = classes / (Pack<T>::kLanes * kRowUnroll);
  int threads = 32;
  while (threads < useful && threads < kRowThreads) threads *= 2;
  return threads;
}

void check_limits(const char* op, const CrossEntropySettings& s) {
  constexpr int64_t limit = 1 << 30;  // blocks of a grid, and indices in a row, are ints
  IMBSAM_CHECK(s.rows <= limit && s.classes <= limit,
               op << ": logits is (" << s.rows << ", " << s.classes << "), expected at most "
                  << limit << " rows and classes on a CUDA device");
}

template <class S>
const S* as(const void* p) {
  return static_cast<const S*>(p);
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
