// Vectors of float for one instruction set, chosen by the compiler's flags; + - * / are GCC's operators or ours.
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

#else  // any processor: GCC makes of two vectors of four what it has

constexpr int kWidth = 8;
typedef float Four __attribute__((vector_size(16)));
typedef int32_t FourBits __attribute__((vector_size(16)));
typedef uint8_t Bits;
struct Vec { Four low, high; };
struct Mask { FourBits low, high; };
inline Vec operator+(Vec a, Vec b) { return {a.low + b.low, a.high + b.high}; }
inline Vec operator-(Vec a, Vec b) { return {a.low - b.low, a.high - b.high}; }
inline Vec operator*(Vec a, Vec b) { return {a.low * b.low, a.high * b.high}; }
inline Vec operator/(Vec a, Vec b) { return {a.low / b.low, a.high / b.high}; }
inline Vec load(const float* p) { Vec v; __builtin_memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline Vec splat(float a) { return {Four{a, a, a, a}, Four{a, a, a, a}}; }
inline Four larger(Four a, Four b) { return a > b ? a : b; }
inline Four smaller(Four a, Four b) { return a < b ? a : b; }
inline Four masked(FourBits m, Four v) { return reinterpret_cast<Four>(m & reinterpret_cast<FourBits>(v)); }
inline Vec larger(Vec a, Vec b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }
inline Vec smaller(Vec a, Vec b) { return {smaller(a.low, b.low), smaller(a.high, b.high)}; }
inline Vec where(Mask m, Vec v) { return {masked(m.low, v.low), masked(m.high, v.high)}; }
inline Vec magnitude(Vec a) {
  const FourBits all = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
  return where({all, all}, a);
}
inline Mask at_least(Vec a, Vec b) { return {a.low >= b.low, a.high >= b.high}; }
inline Mask at_most(Vec a, Vec b) { return {a.low <= b.low, a.high <= b.high}; }
inline Mask both(Mask a, Mask b) { return {a.low & b.low, a.high & b.high}; }
inline Bits to_bits(Mask m) {
#if defined(__SSE2__)
  return static_cast<Bits>(__builtin_ia32_movmskps(reinterpret_cast<Four>(m.low)) |
                           __builtin_ia32_movmskps(reinterpret_cast<Four>(m.high)) << 4);
#else
  unsigned bits = 0;
  for (int i = 0; i < 4; ++i) bits |= (m.low[i] & 1u) << i | (m.high[i] & 1u) << (i + 4);
  return static_cast<Bits>(bits);
#endif
}
inline Mask from_bits(Bits b) {
  const FourBits low = {1, 2, 4, 8}, high = {16, 32, 64, 128}, all = {b, b, b, b};
  return {(all & low) == low, (all & high) == high};
}

#endif

// Half a vector, and its elements as float64.
constexpr int kHalf = kWidth / 2;
typedef float Half __attribute__((vector_size(kHalf * sizeof(float))));
typedef double Wide __attribute__((vector_size(kHalf * sizeof(double))));
#if defined(__AVX512F__)
inline Half low_half(Vec v) { return reinterpret_cast<Half>(_mm512_castps512_ps256(v)); }
inline Half high_half(Vec v) { return reinterpret_cast<Half>(_mm512_extractf32x8_ps(v, 1)); }
#elif defined(__AVX2__)
inline Half low_half(Vec v) { return reinterpret_cast<Half>(_mm256_castps256_ps128(v)); }
inline Half high_half(Vec v) { return reinterpret_cast<Half>(_mm256_extractf128_ps(v, 1)); }
#else
inline Half low_half(Vec v) { return v.low; }
inline Half high_half(Vec v) { return v.high; }
#endif
inline Wide widened(Half half) { return __builtin_convertvector(half, Wide); }
inline double total(const Wide& wide) {
  double sum = 0;
  for (int i = 0; i < kHalf; ++i) sum += wide[i];
  return sum;
}

// A sum of many floats: short runs in float32 lanes, the runs in float64. The order is fixed, so the result is too.
class Sum {
 public:
  void add(Vec v) { run_ = run_ + v; }
  void flush() {
    sum_ += widened(low_half(run_)) + widened(high_half(run_));
    run_ = splat(0);
  }
  double value() { flush(); return total(sum_); }
 private:
  Vec run_ = splat(0);
  Wide sum_ = {};
};
constexpr int64_t kRun = 64;  // vectors added up in float32 before a flush

// Sums of |x| and x * x in float64 throughout: scales are made of them, and those must not depend on the order.
class Moments {
 public:
  void add(Vec x) {
    const Vec abs = magnitude(x);
    const Wide low = widened(low_half(abs)), high = widened(high_half(abs));
    abs_ += low + high;
    square_ += low * low + high * high;
  }
  double abs() const { return total(abs_); }
  double square() const { return total(square_); }
 private:
  Wide abs_ = {}, square_ = {};
};

}  // namespace
