// What the C++ that translate.py writes is made of.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>

#include "cuda_runtime.h"

constexpr size_t kSharedBytes = 48 << 10;

extern "C" {
int mutant = 0;  // the mutation that is in force, 0 for none
alignas(16) char shared[kSharedBytes];
}

namespace {

[[noreturn]] void die(const char* message) {
  fprintf(stderr, "%s\n", message);
  abort();
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline double double_of(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline uint64_t bits_of(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline void check(const char* at, unsigned size) {
  if ((uintptr_t)at % size) die("a misaligned address");
}

inline void check_shared(const char* at, unsigned size) {
  check(at, size);
  if (at < shared || at + size > shared + kSharedBytes) die("an address outside of shared memory");
}

// For tests of coalescing: the accesses of the first warp of the first block.
inline void note(int instruction, const char* at, unsigned size) {
  if (on_host::noting && threadIdx.x < 32 && blockIdx.x == 0)
    on_host::note(instruction, (uintptr_t)at, size);
}

// Of whole warps, which is all that the kernels use.
template <class V>
inline V shuffle_down(V mine, uint32_t distance, uint32_t clamp, uint32_t mask) {
  if (clamp != 31 || mask != 0xffffffffu) die("a shuffle of a part of a warp");
  return __shfl_down_sync(mask, mine, (int)distance);
}
template <class V>
inline V shuffle_across(V mine, uint32_t lanes, uint32_t clamp, uint32_t mask) {
  if (clamp != 31 || mask != 0xffffffffu) die("a shuffle of a part of a warp");
  return __shfl_xor_sync(mask, mine, (int)lanes);
}

inline float from_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }

inline uint16_t to_bf16(float x) {  // to nearest even
  const uint32_t word = bits_of(x);
  return x != x ? 0x7fff : (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t x) {
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  float value;
  if (exponent == 31)
    value = fraction ? NAN : INFINITY;
  else
    value = exponent ? ldexpf(fraction + 1024, exponent - 25) : ldexpf(fraction, -24);
  return x >> 15 ? -value : value;
}

inline uint16_t to_f16(float x) {  // to nearest even, as nearbyint rounds
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::abs(x);
  if (size != size) return 0x7fff;
  if (size >= 65520) return sign | 0x7c00;
  if (size == 0) return sign;
  int exponent;
  frexpf(size, &exponent);
  exponent = exponent - 1 < -14 ? -14 : exponent - 1;  // of the last place: exponent - 10
  const int places = (int)nearbyintf(ldexpf(size, 10 - exponent));
  return sign | (uint16_t)(places + (exponent + 14) * 1024);  // a carry raises the exponent
}

// a + sign b of the halves of two words: a float is long enough to be rounded once more.
template <float from(uint16_t), uint16_t to(float)>
inline uint32_t packed_add(uint32_t a, uint32_t b, float sign) {
  const uint16_t low = to(from((uint16_t)a) + sign * from((uint16_t)b));
  const uint16_t high = to(from(a >> 16) + sign * from(b >> 16));
  return (uint32_t)high << 16 | low;
}

// The `count` low bits of x, at bit `at` of y.
inline uint32_t bits_inserted(uint32_t x, uint32_t y, uint32_t at, uint32_t count) {
  const uint32_t mask = (uint32_t)(((uint64_t)1 << count) - 1) << at;
  return (x << at & mask) | (y & ~mask);
}

// The `count` bits of x from bit `at` on, extended by their sign if x has one.
template <class X>
inline X bits_extracted(X x, uint32_t at, uint32_t count) {
  if (!count || at + count > 32) die("bits outside of a register");
  return (X)((uint32_t)x << (32 - at - count)) >> (32 - count);
}

inline int32_t warp_maximum(int32_t mine, uint32_t mask) {
  for (uint32_t lanes = 16; lanes > 0; lanes /= 2) {
    const int32_t other = shuffle_across(mine, lanes, 31, mask);
    mine = other > mine ? other : mine;
  }
  return mine;
}

// Row r of matrix i begins where thread 8 i + r of the warp says. Each thread's words are, in
// matrix i, two neighbours of row lane / 4, or of a column where it is transposed.
template <bool loads, bool transposed>
inline void move_matrices(char* mine, uint32_t (&word)[4]) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x - lane;
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned row = transposed ? 2 * (lane % 4) + half : lane / 4;
      const unsigned column = transposed ? lane / 4 : 2 * (lane % 4) + half;
      char* at = exchange(mine, warp + 8 * i + row);
      check_shared(at, 16);
      uint16_t* element = (uint16_t*)at + column;
      uint16_t* own = (uint16_t*)&word[i] + half;
      *(loads ? own : element) = *(loads ? element : own);
    }
  on_host::warp_barrier();  // nobody goes on before all have their elements
}

inline float saturated(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

inline float fma_down(float a, float b, float c) {  // rounded toward -infinity
  const double exact = (double)a * b + c;           // as far as a double holds it
  const float near = (float)exact;
  return near > exact ? nextafterf(near, -INFINITY) : near;
}

inline double reciprocal_of_high_word(double x) {
  return double_of(bits_of(1 / x) & 0xffffffff00000000ull);
}

}  // namespace
