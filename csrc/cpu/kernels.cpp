// Every operation on one span, for one instruction set: compiled once per IMBSAM_ISA.
//
// The last elements of a span, fewer than a vector, go through a small buffer, so that each
// formula is written once.

#include <math.h>
#include <stdint.h>
#if defined(IMBSAM_X86)
#include <immintrin.h>
#endif

#include "../arithmetic.h"
#include "spans.h"

namespace imbsam {
namespace cpu {
namespace IMBSAM_ISA {
namespace {

#include "vec.h"

template <class T>
IMBSAM_INLINE void copy(T* to, const T* from, int64_t n) {
  __builtin_memcpy(to, from, n * sizeof(T));
}

// ---------------------------------------------------------------- sums

// Sums square(i) over 16 elements at a time; load16(p) reads 16 elements from pointers moved by
// i, or from padded copies of the last ones.
template <class T, class Add>
IMBSAM_INLINE void for_each_16(const T* a, const T* b, int64_t n, Add add) {
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) add(a + i, b ? b + i : nullptr);
  if (i < n) {
    T last_a[kSumLanes] = {}, last_b[kSumLanes] = {};
    copy(last_a, a + i, n - i);
    if (b) copy(last_b, b + i, n - i);
    add(last_a, b ? last_b : nullptr);
  }
}

template <class T>
double squared_norm(const void* g_t, const void* theta, int64_t n) {
  Sum sum = {};
  for_each_16((const T*)g_t, (const T*)theta, n, [&](const T* g, const T* t) {
    Sum x = widened<T>([&](int j) { return load(g + j); });
    if (t) {
      const Sum w = widened<T>([&](int j) { return load(t + j); });
      for (int v = 0; v < kSumVectors; ++v) x.lanes[v] *= w.lanes[v];
    }
    for (int v = 0; v < kSumVectors; ++v) sum.lanes[v] += x.lanes[v] * x.lanes[v];
  });
  return total(sum);
}

template <class T>
double grad_check(const void* g_h, const void* g_p, int64_t n, bool* finite) {
  Sum sum = {}, residue = {};  // x - x is 0 where x is finite, else not a number
  for_each_16((const T*)g_p, (const T*)g_h, n, [&](const T* p, const T* h) {
    const Sum x = widened<T>([&](int j) { return h ? load(h + j) + load(p + j) : load(p + j); });
    for (int v = 0; v < kSumVectors; ++v) {
      sum.lanes[v] += x.lanes[v] * x.lanes[v];
      residue.lanes[v] += x.lanes[v] - x.lanes[v];
    }
  });
  if (total(residue) != 0) *finite = false;
  return total(sum);
}

#include "../bases.h"
#include "updates.h"

// ---------------------------------------------------------------- cross-entropy rows

template <class V, class S>
IMBSAM_INLINE V filled(S value) {
  return V{} + value;
}

template <class T>
double element(const void* x, int64_t i) {
  T one[Lanes<T>::kLanes] = {};
  one[0] = ((const T*)x)[i];
  return (double)load(one)[0];
}

template <class T>
RowSums row_sums(const void* z_, int64_t classes, const void* w_, bool weighted) {
  typedef typename Lanes<T>::S S;
  typedef typename Lanes<T>::V V;
  constexpr int lanes = Lanes<T>::kLanes;
  const T* z = (const T*)z_;
  const S* w = (const S*)w_;

  const V lowest = filled<V>(-(S)INFINITY);
  T last[kSumLanes];  // the last elements, padded with -inf, whose exp is 0
  for (int j = 0; j < kSumLanes; j += lanes) store(last + j, lowest);
  const int64_t whole = classes - classes % kSumLanes;
  copy(last, z + whole, classes - whole);

  V highest = lowest;
  const auto raise = [&](const T* p) {
    for (int j = 0; j < kSumLanes; j += lanes) {
      const V x = load(p + j);
      highest = x > highest ? x : highest;
    }
  };
  for (int64_t i = 0; i < whole; i += kSumLanes) raise(z + i);
  raise(last);
  S max = highest[0];
  for (int j = 1; j < lanes; ++j) max = highest[j] > max ? highest[j] : max;

  Sum sum = {};
  const auto add = [&](const T* p) {
    const Sum x = widened<T>([&](int j) { return exp_(load(p + j) - max); });
    for (int v = 0; v < kSumVectors; ++v) sum.lanes[v] += x.lanes[v];
  };
  for (int64_t i = 0; i < whole; i += kSumLanes) add(z + i);
  add(last);

  RowSums sums = {(double)max, log(total(sum)), 0.0};
  if (!weighted) return sums;
  Sum dot = {};
  for (int64_t i = 0; i < whole; i += kSumLanes) {
    Sum x = widened<T>([&](int j) { return load(z + i + j) - max; });
    if (w) {
      const Sum y = widened<S>([&](int j) { return load(w + i + j); });
      for (int v = 0; v < kSumVectors; ++v) x.lanes[v] *= y.lanes[v];
    }
    for (int v = 0; v < kSumVectors; ++v) dot.lanes[v] += x.lanes[v];
  }
  sums.weighted_sum = total(dot);
  for (int64_t i = whole; i < classes; ++i)
    sums.weighted_sum += (S)(element<T>(z, i) - max) * (w ? (double)w[i] : 1.0);
  return sums;
}

template <class T>
void softmax_gradient(const void* z_, void* dz_, int64_t classes, double max_, double log_sum_,
                      double soft_, double smooth_, const void* w_, int64_t y, double hard) {
  typedef typename Lanes<T>::S S;
  constexpr int lanes = Lanes<T>::kLanes;
  const T* z = (const T*)z_;
  T* dz = (T*)dz_;
  const S* w = (const S*)w_;
  const S max = (S)max_, log_sum = (S)log_sum_, soft = (S)soft_, smooth = (S)smooth_;
  const auto gradient = [&](const T* p, const S* weight) {
    const auto g = exp_(load(p) - max - log_sum) * soft;
    if (smooth == 0) return g;
    return weight ? g - load(weight) * smooth : g - smooth;
  };
  // Element y is written last, from the same formula: dz may not be read back in a half dtype.
  T at_y[lanes] = {};
  S weight_y[lanes] = {};
  at_y[0] = z[y];
  if (w) weight_y[0] = w[y];
  store(at_y, gradient(at_y, w ? weight_y : nullptr) - (S)hard);

  int64_t i = 0;
  for (; i + lanes <= classes; i += lanes) store(dz + i, gradient(z + i, w ? w + i : nullptr));
  if (i < classes) {
    T last[lanes] = {};
    S weight[lanes] = {};
    copy(last, z + i, classes - i);
    if (w) copy(weight, w + i, classes - i);
    store(last, gradient(last, w ? weight : nullptr));
    copy(dz + i, last, classes - i);
  }
  dz[y] = at_y[0];
}

template <class T>
SoftSums soft_sums(const void* z_, const void* q_, const void* plain_, const void* sharp_,
                   const void* w_, int64_t classes, double max_) {
  typedef typename Lanes<T>::S S;
  const T* z = (const T*)z_;
  const S *q = (const S*)q_, *w = (const S*)w_;
  const S* parts[2] = {(const S*)plain_, (const S*)sharp_};
  const S max = (S)max_;
  Sum dot[2] = {}, weighted[2] = {}, mass[2] = {}, labels = {};
  // 16 elements at these places; padded ones have q = 0.
  const auto add = [&](const T* z16, const S* q16, const S* const (&p16)[2], const S* w16) {
    const auto read = [&](const S* from) {
      return widened<S>([&](int j) { return load(from + j); });
    };
    const Sum x = widened<T>([&](int j) { return load(z16 + j) - max; });
    const Sum label = read(q16);
    const Sum weight = w16 ? read(w16) : Sum{};
    for (int part = 0; part < 2; ++part) {
      const Sum of_class = read(p16[part]);
      for (int v = 0; v < kSumVectors; ++v) {
        VecD share = label.lanes[v] * of_class.lanes[v];
        mass[part].lanes[v] += share;
        if (w16) share *= weight.lanes[v];
        weighted[part].lanes[v] += share;
        const VecD product = share * x.lanes[v];
        // Without a share a class counts nothing whatever its logit is.
        dot[part].lanes[v] += share > 0.0 ? product : VecD{};
      }
    }
    for (int v = 0; v < kSumVectors; ++v) labels.lanes[v] += label.lanes[v];  // none is negative
  };
  int64_t i = 0;
  for (; i + kSumLanes <= classes; i += kSumLanes)
    add(z + i, q + i, {parts[0] + i, parts[1] + i}, w ? w + i : nullptr);
  if (i < classes) {
    T last_z[kSumLanes] = {};
    S last[4][kSumLanes] = {};
    copy(last_z, z + i, classes - i);
    copy(last[0], q + i, classes - i);
    for (int part = 0; part < 2; ++part) copy(last[1 + part], parts[part] + i, classes - i);
    if (w) copy(last[3], w + i, classes - i);
    add(last_z, last[0], {last[1], last[2]}, w ? last[3] : nullptr);
  }
  return {{total(dot[0]), total(dot[1])},
          {total(weighted[0]), total(weighted[1])},
          {total(mass[0]), total(mass[1])},
          total(labels) != 0};
}

template <class T>
void soft_gradient(const void* z_, const void* q_, const void* v_, const void* w_, void* dz_,
                   int64_t classes, double max_, double log_sum_, double soft_, double smooth_) {
  typedef typename Lanes<T>::S S;
  constexpr int lanes = Lanes<T>::kLanes;
  const T* z = (const T*)z_;
  T* dz = (T*)dz_;
  const S *q = (const S*)q_, *v = (const S*)v_, *w = (const S*)w_;
  const S max = (S)max_, log_sum = (S)log_sum_, soft = (S)soft_, smooth = (S)smooth_;
  const auto gradient = [&](const T* p, const S* label, const S* of_label, const S* weight) {
    const auto g = exp_(load(p) - max - log_sum) * soft - load(label) * load(of_label);
    if (smooth == 0) return g;
    return weight ? g - load(weight) * smooth : g - smooth;
  };
  int64_t i = 0;
  for (; i + lanes <= classes; i += lanes)
    store(dz + i, gradient(z + i, q + i, v + i, w ? w + i : nullptr));
  if (i < classes) {
    T last[lanes] = {};
    S label[lanes] = {}, of_label[lanes] = {}, weight[lanes] = {};
    copy(last, z + i, classes - i);
    copy(label, q + i, classes - i);
    copy(of_label, v + i, classes - i);
    if (w) copy(weight, w + i, classes - i);
    store(last, gradient(last, label, of_label, w ? weight : nullptr));
    copy(dz + i, last, classes - i);
  }
}

// ---------------------------------------------------------------- the machine's limit

// Several sums side by side, so that memory and not the latency of an addition is the limit.
double read_lines(const float* b, int64_t n) {
  constexpr int lanes = Lanes<float>::kLanes, sums = 8;
  VecF sum[sums] = {};
  int64_t i = 0;
  for (; i + sums * lanes <= n; i += sums * lanes)
    for (int s = 0; s < sums; ++s) sum[s] += load(b + i + s * lanes);
  double total = 0;
  for (int s = 0; s < sums; ++s)
    for (int j = 0; j < lanes; ++j) total += sum[s][j];
  for (; i < n; ++i) total += b[i];
  return total;
}

template <bool kStream>
void triad_lines(float* a, const float* b, const float* c, int64_t n) {
  for_each_line(
      a, n, kStream,
      [&](int64_t i) {
        const VecF sum = load(b + i) + load(c + i) * 3.0f;
        if (kStream)
          stream(a + i, sum);
        else
          store(a + i, sum);
      },
      [&](int64_t i, int64_t count) {
        for (int64_t end = i + count; i < end; ++i) a[i] = b[i] + c[i] * 3.0f;
      });
  if (kStream) stream_fence();
}

double bandwidth(Traffic traffic, bool stream, float* a, const float* b, const float* c,
                 int64_t n) {
  if (traffic == Traffic::read) return read_lines(b, n);
  with_bool(stream, [&](auto streams) {
    if (traffic == Traffic::copy)
      restore_lines<decltype(streams)::value>(a, b, n);
    else
      triad_lines<decltype(streams)::value>(a, b, c, n);
  });
  return 0;
}

// ---------------------------------------------------------------- the table

bool supported() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  // Every processor with AVX2 has F16C.
  return __builtin_cpu_supports("avx2");
#else
  return true;
#endif
}

// The updates of all bases, in the order of kBases.
template <class T, int... kIndices>
constexpr Spans spans(Indices<kIndices...>) {
  return {squared_norm<T>, perturb_<T>, {update_<T, (Base)kIndices>...}, merge_<T>,
          grad_check<T>,   row_sums<T>, softmax_gradient<T>,             soft_sums<T>,
          soft_gradient<T>, element<T>};
}

template <class T>
constexpr Spans spans() {
  return spans<T>(typename UpTo<kBaseCount>::type());
}

}  // namespace
}  // namespace IMBSAM_ISA

#define IMBSAM_JOIN_(a, b) a##b
#define IMBSAM_JOIN(a, b) IMBSAM_JOIN_(a, b)
#define IMBSAM_STRING_(a) #a
#define IMBSAM_STRING(a) IMBSAM_STRING_(a)

const Isa IMBSAM_JOIN(isa_, IMBSAM_ISA) = {
    IMBSAM_STRING(IMBSAM_ISA),
    IMBSAM_ISA::supported,
    {IMBSAM_ISA::spans<float>(), IMBSAM_ISA::spans<double>(),
     IMBSAM_ISA::spans<IMBSAM_ISA::BFloat16>(), IMBSAM_ISA::spans<IMBSAM_ISA::Float16>()},
    IMBSAM_ISA::bandwidth,
};

}  // namespace cpu
}  // namespace imbsam
