// Vectors of float for one instruction set, chosen by the compiler's flags; GCC's operators do the arithmetic.
//
// Included by kernels.cc only, which is compiled once per instruction set. Everything is in an unnamed namespace and
// no library header with inline code is used, so that no function compiled for a large set can be linked into the
// code of a smaller one.
#pragma once
#include <stdint.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)

constexpr int kWidth = 16;
typedef __m512 Vec;
typedef __mmask16 Mask;
typedef uint16_t Bits;
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec splat(float a) { return _mm512_set1_ps(a); }
// Both return their second argument if one is NaN.
inline Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec magnitude(Vec a) { return _mm512_abs_ps(a); }
inline Mask at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask at_most(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
inline Mask both(Mask a, Mask b) { return _kand_mask16(a, b); }
inline Vec where(Mask m, Vec v) { return _mm512_maskz_mov_ps(m, v); }
inline Bits to_bits(Mask m) { return m; }
inline Mask from_bits(Bits b) { return b; }

#elif defined(__AVX2__)

constexpr int kWidth = 8;
typedef __m256 Vec;
typedef __m256 Mask;
typedef uint8_t Bits;
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec splat(float a) { return _mm256_set1_ps(a); }
inline Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec magnitude(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Mask at_least(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline Mask at_most(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_LE_OQ); }
inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
inline Vec where(Mask m, Vec v) { return _mm256_and_ps(m, v); }
inline Bits to_bits(Mask m) { return static_cast<Bits>(_mm256_movemask_ps(m)); }
inline Mask from_bits(Bits b) {
  const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(b), place);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, place));
}

#else  // any processor: GCC makes of these vectors what it has

constexpr int kWidth = 8;
typedef float Vec __attribute__((vector_size(32)));
typedef int32_t Mask __attribute__((vector_size(32)));
typedef uint8_t Bits;
inline Vec load(const float* p) { Vec v; __builtin_memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec splat(float a) { return Vec{a, a, a, a, a, a, a, a}; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
inline Vec magnitude(Vec a) { return reinterpret_cast<Vec>(reinterpret_cast<Mask>(a) & 0x7fffffff); }
inline Mask at_least(Vec a, Vec b) { return a >= b; }
inline Mask at_most(Vec a, Vec b) { return a <= b; }
inline Mask both(Mask a, Mask b) { return a & b; }
inline Vec where(Mask m, Vec v) { return reinterpret_cast<Vec>(m & reinterpret_cast<Mask>(v)); }
inline Bits to_bits(Mask m) {
  unsigned bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= (m[i] & 1u) << i;
  return static_cast<Bits>(bits);
}
inline Mask from_bits(Bits b) {
  const Mask place = {1, 2, 4, 8, 16, 32, 64, 128};
  const Mask all = {b, b, b, b, b, b, b, b};
  return (all & place) == place;
}

#endif

inline double total(Vec v) {
  float lane[kWidth];
  store(lane, v);
  double sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += lane[i];
  return sum;
}

// A sum of many floats: short runs in float32 lanes, the runs in float64. The order is fixed, so the result is too.
class Sum {
 public:
  void add(Vec v) { run_ = run_ + v; }
  void flush() { sum_ += total(run_); run_ = splat(0); }
  double value() { flush(); return sum_; }
 private:
  Vec run_ = splat(0);
  double sum_ = 0;
};
constexpr int64_t kRun = 64;  // vectors added up in float32 before a flush

// Sums of |x| and x * x in float64 throughout: scales are made of them, and those must not depend on the order.
typedef float Eight __attribute__((vector_size(32)));
typedef double Wide __attribute__((vector_size(64)));
class Moments {
 public:
  void add(Vec x) {
#if defined(__AVX512F__)
    add_eight(reinterpret_cast<Eight>(_mm512_castps512_ps256(x)));
    add_eight(reinterpret_cast<Eight>(_mm512_extractf32x8_ps(x, 1)));
#else
    add_eight(reinterpret_cast<Eight>(x));
#endif
  }
  double abs() const { return total(abs_); }
  double square() const { return total(square_); }
 private:
  void add_eight(Eight x) {
    const Wide wide = __builtin_convertvector(x, Wide);
    abs_ += wide < 0 ? -wide : wide;
    square_ += wide * wide;
  }
  static double total(const Wide& w) { return ((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7])); }
  Wide abs_ = {}, square_ = {};
};

}  // namespace
