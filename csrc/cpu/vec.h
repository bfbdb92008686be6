// Vectors of one instruction set: load and store of every dtype as float or double vectors.
//
// Included by kernels.cpp inside the namespace of its instruction set. Built on the vector
// extensions of GCC and Clang; intrinsics only where those have no word for it.

#if defined(__AVX512F__)
#define IMBSAM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define IMBSAM_VECTOR_BYTES 32
#else
#define IMBSAM_VECTOR_BYTES 16
#endif

typedef float VecF __attribute__((vector_size(IMBSAM_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(IMBSAM_VECTOR_BYTES)));
typedef int32_t VecI32 __attribute__((vector_size(IMBSAM_VECTOR_BYTES)));
typedef uint32_t VecU32 __attribute__((vector_size(IMBSAM_VECTOR_BYTES)));
typedef int64_t VecI64 __attribute__((vector_size(IMBSAM_VECTOR_BYTES)));
typedef uint16_t VecU16 __attribute__((vector_size(IMBSAM_VECTOR_BYTES / 2)));

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// S is the arithmetic dtype of data T, V a vector of it, kLanes its length.
template <class T>
struct Lanes {
  typedef float S;
  typedef VecF V;
  static constexpr int kLanes = IMBSAM_VECTOR_BYTES / 4;
};
template <>
struct Lanes<double> {
  typedef double S;
  typedef VecD V;
  static constexpr int kLanes = IMBSAM_VECTOR_BYTES / 8;
};

template <class To, class From>
IMBSAM_INLINE To load_bytes(const From* p) {
  To v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

// ---- bfloat16: the upper half of a float, rounded to nearest even

IMBSAM_INLINE VecF widen_bfloat16(VecU16 h) {
  return (VecF)(__builtin_convertvector(h, VecU32) << 16);
}

IMBSAM_INLINE VecU16 narrow_bfloat16(VecF v) {
  const VecU32 u = (VecU32)v;
  const VecU32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU32 nan = (VecU32)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), VecU16);
}

// ---- float16

#if defined(__AVX512F__)
IMBSAM_INLINE VecF widen_float16(VecU16 h) { return (VecF)_mm512_cvtph_ps((__m256i)h); }
IMBSAM_INLINE VecU16 narrow_float16(VecF v) {
  return (VecU16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
IMBSAM_INLINE VecF widen_float16(VecU16 h) { return (VecF)_mm256_cvtph_ps((__m128i)h); }
IMBSAM_INLINE VecU16 narrow_float16(VecF v) {
  return (VecU16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
IMBSAM_INLINE VecF widen_float16(VecU16 half) {
  const VecU32 h = __builtin_convertvector(half, VecU32);
  const VecU32 exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  // A subnormal's mantissa counts 2^-24.
  const VecU32 subnormal = (VecU32)(__builtin_convertvector((VecI32)mantissa, VecF) * 0x1p-24f);
  const VecU32 not_finite = (VecU32)(exponent == 31u);  // then it becomes 255
  const VecU32 normal = (mantissa << 13) | ((exponent + 112u + (not_finite & 112u)) << 23);
  return (VecF)(((h & 0x8000u) << 16) | (exponent == 0u ? subnormal : normal));
}

IMBSAM_INLINE VecU16 narrow_float16(VecF v) {
  const VecI32 bits = (VecI32)v & 0x7fffffff;
  // Below 2^-14 a float addition rounds to multiples of 2^-24.
  const VecI32 subnormal = (VecI32)((VecF)bits + 0.5f) - 0x3f000000;
  const VecI32 normal = (bits + (0xfff - 0x38000000) + ((bits >> 13) & 1)) >> 13;
  VecI32 h = bits < 0x38800000 ? subnormal : normal;
  h = bits >= 0x477ff000 ? VecI32{} + 0x7c00 : h;  // rounds to 2^16 or beyond
  h = bits > 0x7f800000 ? VecI32{} + 0x7e00 : h;
  return __builtin_convertvector((VecU32)h | (((VecU32)v >> 16) & 0x8000u), VecU16);
}
#endif

// ---- load, store, stream

IMBSAM_INLINE VecF load(const float* p) { return load_bytes<VecF>(p); }
IMBSAM_INLINE VecD load(const double* p) { return load_bytes<VecD>(p); }
IMBSAM_INLINE VecF load(const BFloat16* p) { return widen_bfloat16(load_bytes<VecU16>(p)); }
IMBSAM_INLINE VecF load(const Float16* p) { return widen_float16(load_bytes<VecU16>(p)); }

// The bits that store(p, v) writes.
IMBSAM_INLINE VecF packed(const float*, VecF v) { return v; }
IMBSAM_INLINE VecD packed(const double*, VecD v) { return v; }
IMBSAM_INLINE VecU16 packed(const BFloat16*, VecF v) { return narrow_bfloat16(v); }
IMBSAM_INLINE VecU16 packed(const Float16*, VecF v) { return narrow_float16(v); }

template <class T>
IMBSAM_INLINE void store(T* p, typename Lanes<T>::V v) {
  const auto bits = packed(p, v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// A store past the caches; p is aligned to the size of what is stored.
template <class T>
IMBSAM_INLINE void stream(T* p, typename Lanes<T>::V v) {
  const auto bits = packed(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(bits) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)bits);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(bits) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)bits);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(bits) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)bits);
#endif
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// Streaming stores must be visible before another thread is told of them.
IMBSAM_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- sums in 16 double lanes: lane i adds the elements i, i + 16, ..., on every
// instruction set, so that all of them give the same bits

constexpr int kSumLanes = 16;
constexpr int kSumVectors = kSumLanes * 8 / IMBSAM_VECTOR_BYTES;

struct Sum {
  VecD lanes[kSumVectors];
};

IMBSAM_INLINE void widen(VecF v, VecD* out) {
#if defined(__AVX512F__)
  out[0] = (VecD)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
  out[1] = (VecD)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
  out[0] = (VecD)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
  out[1] = (VecD)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#elif defined(__SSE2__)
  out[0] = (VecD)_mm_cvtps_pd((__m128)v);
  out[1] = (VecD)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v));
#else
  for (int i = 0; i < 4; ++i) out[i / 2][i % 2] = v[i];
#endif
}
IMBSAM_INLINE void widen(VecD v, VecD* out) { *out = v; }

// Calls make(j) for the vectors that hold 16 elements of T and returns them as doubles.
template <class T, class Make>
IMBSAM_INLINE Sum widened(Make make) {
  constexpr int lanes = Lanes<T>::kLanes;
  constexpr int doubles = kSumVectors * lanes / kSumLanes;  // double vectors in one of T
  Sum x;
  for (int j = 0; j < kSumLanes / lanes; ++j) widen(make(j * lanes), x.lanes + j * doubles);
  return x;
}

IMBSAM_INLINE double total(const Sum& sum) {
  double lanes[kSumLanes];
  __builtin_memcpy(lanes, sum.lanes, sizeof(lanes));
  for (int width = kSumLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// ---- square roots, rounded to nearest

IMBSAM_INLINE VecF square_root(VecF x) {
#if defined(__AVX512F__)
  return (VecF)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (VecF)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (VecF)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < IMBSAM_VECTOR_BYTES / 4; ++i) x[i] = sqrtf(x[i]);
  return x;
#endif
}

IMBSAM_INLINE VecD square_root(VecD x) {
#if defined(__AVX512F__)
  return (VecD)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (VecD)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  return (VecD)_mm_sqrt_pd((__m128d)x);
#else
  for (int i = 0; i < IMBSAM_VECTOR_BYTES / 8; ++i) x[i] = sqrt(x[i]);
  return x;
#endif
}

// ---- exp(x) for x <= 0 or little above; 0 below the normal range; not-a-number stays

// exp(r) = 1 + r + r^2 P(r) for |r| <= log(2) / 2; P: minimax coefficients of Cephes' expf
IMBSAM_INLINE VecF exp_near_0(VecF r) {
  VecF p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

// The Taylor series to r^13 / 13!, by Horner's scheme
IMBSAM_INLINE VecD exp_near_0(VecD r) {
  double factorial = 6227020800.0;  // 13!
  VecD sum = r * 0.0 + 1.0 / factorial;
  for (int k = 13; k > 0; --k) {
    factorial /= k;
    sum = sum * r + 1.0 / factorial;
  }
  return sum;
}

IMBSAM_INLINE VecF exp_(VecF x) {
  const VecI32 tiny = x < -87.0f;
  const VecF shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to integer
  const VecF n = shifted - 12582912.0f;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const VecF power = (VecF)(((VecI32)shifted << 23) + (127 << 23));
  return (VecF)((VecI32)(exp_near_0(r) * power) & ~tiny);
}

IMBSAM_INLINE VecD exp_(VecD x) {
  const VecI64 tiny = x < -708.0;
  const VecD shifted = x * 1.4426950408889634074 + 6755399441055744.0;  // 1.5 * 2^52
  const VecD n = shifted - 6755399441055744.0;
  const VecD r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  const VecD power = (VecD)(((VecI64)shifted << 52) + ((int64_t)1023 << 52));
  return (VecD)((VecI64)(exp_near_0(r) * power) & ~tiny);
}
