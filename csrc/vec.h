// Eight or sixteen floats and the few operations that tile kernels need, for the instruction set of the including file.
//
// Everything sits in an unnamed namespace and calls nothing inline from the standard library: a function compiled for
// AVX-512 must never be the copy that the linker keeps for the whole program.
#pragma once

#include <stdint.h>

#if defined(SGCD_AVX512) || defined(SGCD_AVX2)
#include <immintrin.h>
#endif

namespace {

#if defined(SGCD_AVX512)

struct Vec {
  static constexpr int width = 16;
  using Mask = __mmask16;
  __m512 v;

  Vec() = default;
  Vec(__m512 x) : v(x) {}
  Vec(float x) : v(_mm512_set1_ps(x)) {}
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};

inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
// A NaN in the second operand comes through both of these, one in the first does not.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
inline Vec::Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Vec::Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline bool any(Vec::Mask m) { return m != 0; }
inline Vec where(Vec::Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b.v, a.v); }
inline Vec fma_where(Vec::Mask m, Vec a, Vec b, Vec c) { return _mm512_mask3_fmadd_ps(a.v, b.v, c.v, m); }
// a + b where m, else a; and the reverse
inline Vec add_where(Vec::Mask m, Vec a, Vec b) { return _mm512_mask_add_ps(a.v, m, a.v, b.v); }
inline Vec add_unless(Vec::Mask m, Vec a, Vec b) { return _mm512_mask_add_ps(a.v, _knot_mask16(m), a.v, b.v); }
inline Vec floor(Vec a) { return _mm512_roundscale_ps(a.v, 1); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
// a - floor(a), and 0 for an infinite a
inline Vec fraction(Vec a) { return _mm512_reduce_ps(a.v, 1); }
// a 2^floor(b), right down to denormal results and for b = -inf
inline Vec scale(Vec a, Vec b) { return _mm512_scalef_ps(a.v, b.v); }
// x = m 2^e with m in [3/4, 3/2)
inline Vec split_exponent(Vec x, Vec& m) {
  m = _mm512_getmant_ps(x.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  return _mm512_getexp_ps(_mm512_div_ps(x.v, m.v));
}

#elif defined(SGCD_AVX2)

struct Vec {
  static constexpr int width = 8;
  using Mask = __m256;
  __m256 v;

  Vec() = default;
  Vec(__m256 x) : v(x) {}
  Vec(float x) : v(_mm256_set1_ps(x)) {}
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
};

inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
inline __m256 greater(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
inline __m256 equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
inline bool any(__m256 m) { return _mm256_movemask_ps(m) != 0; }
inline Vec where(__m256 m, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, m); }
inline Vec fma_where(__m256 m, Vec a, Vec b, Vec c) { return where(m, fma(a, b, c), c); }
inline Vec add_where(__m256 m, Vec a, Vec b) { return _mm256_add_ps(a.v, _mm256_and_ps(m, b.v)); }
inline Vec add_unless(__m256 m, Vec a, Vec b) { return _mm256_add_ps(a.v, _mm256_andnot_ps(m, b.v)); }
inline Vec floor(Vec a) { return _mm256_floor_ps(a.v); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
inline Vec power_of_two(Vec n) {  // n whole, in [-126, 127]
  const __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
inline Vec split_exponent(Vec x, Vec& m) {  // x normal and positive
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i shifted = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f400000));  // the bits of 3/4
  const __m256i e = _mm256_srai_epi32(shifted, 23);
  m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)));
  return _mm256_cvtepi32_ps(e);
}

#else

// Plain loops of fixed length, which compilers turn into what the machine has (NEON, SSE2).
struct Vec {
  static constexpr int width = 8;
  struct Mask {
    int32_t on[8];
  };
  float v[8];

  Vec() = default;
  Vec(float x) {
    for (float& y : v) y = x;
  }
  static Vec load(const float* p) {
    Vec r;
    for (int i = 0; i < width; i++) r.v[i] = p[i];
    return r;
  }
  void store(float* p) const {
    for (int i = 0; i < width; i++) p[i] = v[i];
  }
};

#define SGCD_LANES(expression)                              \
  Vec r;                                                    \
  for (int i = 0; i < Vec::width; i++) r.v[i] = expression; \
  return r;
#define SGCD_MASK(expression)                                \
  Vec::Mask r;                                               \
  for (int i = 0; i < Vec::width; i++) r.on[i] = expression; \
  return r;

inline Vec operator+(Vec a, Vec b) { SGCD_LANES(a.v[i] + b.v[i]) }
inline Vec operator-(Vec a, Vec b) { SGCD_LANES(a.v[i] - b.v[i]) }
inline Vec operator*(Vec a, Vec b) { SGCD_LANES(a.v[i] * b.v[i]) }
inline Vec operator/(Vec a, Vec b) { SGCD_LANES(a.v[i] / b.v[i]) }
inline Vec fma(Vec a, Vec b, Vec c) { SGCD_LANES(a.v[i] * b.v[i] + c.v[i]) }
inline Vec max(Vec a, Vec b) { SGCD_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
inline Vec min(Vec a, Vec b) { SGCD_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
inline Vec abs(Vec a) { SGCD_LANES(__builtin_fabsf(a.v[i])) }
inline Vec::Mask greater(Vec a, Vec b) { SGCD_MASK(a.v[i] > b.v[i]) }
inline Vec::Mask equal(Vec a, Vec b) { SGCD_MASK(a.v[i] == b.v[i]) }
inline bool any(Vec::Mask m) {
  int32_t r = 0;
  for (int i = 0; i < Vec::width; i++) r |= m.on[i];
  return r != 0;
}
inline Vec where(Vec::Mask m, Vec a, Vec b) { SGCD_LANES(m.on[i] ? a.v[i] : b.v[i]) }
inline Vec fma_where(Vec::Mask m, Vec a, Vec b, Vec c) { return where(m, fma(a, b, c), c); }
inline Vec add_where(Vec::Mask m, Vec a, Vec b) { return where(m, a + b, a); }
inline Vec add_unless(Vec::Mask m, Vec a, Vec b) { return where(m, a, a + b); }
inline Vec floor(Vec a) { SGCD_LANES(__builtin_floorf(a.v[i])) }
inline Vec sqrt(Vec a) { SGCD_LANES(__builtin_sqrtf(a.v[i])) }
inline Vec power_of_two(Vec n) {
  Vec r;
  for (int i = 0; i < Vec::width; i++) {
    const int32_t bits = (static_cast<int32_t>(n.v[i]) + 127) << 23;
    __builtin_memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
inline Vec split_exponent(Vec x, Vec& m) {
  Vec r;
  for (int i = 0; i < Vec::width; i++) {
    int32_t bits;
    __builtin_memcpy(&bits, &x.v[i], 4);
    const int32_t e = (bits - 0x3f400000) >> 23;
    bits -= e * (1 << 23);
    __builtin_memcpy(&m.v[i], &bits, 4);
    r.v[i] = static_cast<float>(e);
  }
  return r;
}

#undef SGCD_LANES
#undef SGCD_MASK

#endif

// 2^r for r in [0, 1]; least-squares minimax with p(0) = 1, relative error 2e-9 before rounding.
inline Vec exp2_fraction(Vec r) {
  Vec p(0.00021612914861179888f);
  p = fma(p, r, 0.0012467846972867846f);
  p = fma(p, r, 0.009675451554358006f);
  p = fma(p, r, 0.055485282093286514f);
  p = fma(p, r, 0.2402293086051941f);
  p = fma(p, r, 0.6931470632553101f);
  return fma(p, r, 1.0f);
}

// 2^x for x <= 127: exactly 1 at 0, 0 at -inf, NaN at NaN. Below 2^-126 the result may be 0.
inline Vec exp2(Vec x) {
#if defined(SGCD_AVX512)
  return scale(exp2_fraction(fraction(x)), x);
#else
  const Vec t = max(Vec(-126.0f), x);
  const Vec n = where(equal(t, t), floor(t), Vec(0.0f));  // a NaN reaches the result through the fraction
  const Vec p = exp2_fraction(t - n) * power_of_two(n);
  return where(greater(Vec(-126.0f), x), Vec(0.0f), p);
#endif
}

constexpr float kLog2e = 1.4426950408889634f, kLog2eLow = 1.925963033500866e-8f;
constexpr float kLn2 = 0.6931471805599453f;

// The argument's rounding costs |x| 2^-24 relatively: where it is large, what is summed is small.
inline Vec exp(Vec x) { return exp2(x * Vec(kLog2e)); }

// The same with the argument's rounding put back: what rescales a whole sum is felt in the last digit of a divergence.
inline Vec exp_accurate(Vec x) {
  const Vec safe = max(Vec(-200.0f), x), t = safe * Vec(kLog2e);
  const Vec lost = fma(safe, Vec(kLog2e), Vec(0.0f) - t) + safe * Vec(kLog2eLow);
  return exp2(t) * fma(lost, Vec(kLn2), Vec(1.0f));
}

// e^x - 1 for x <= 88, accurate relative to itself near 0
inline Vec expm1(Vec x) {
  const Vec n = floor(fma(x, Vec(kLog2e), Vec(0.5f)));
  const Vec safe = max(Vec(-30.0f), n);  // beyond it the result is -1
  Vec r = fma(safe, Vec(-0.693359375f), max(Vec(-20.0f), x));
  r = fma(safe, Vec(2.12194440e-4f), r);
  Vec p(1.0f / 40320);  // Taylor: |r| <= ln 2 / 2
  p = fma(p, r, 1.0f / 5040);
  p = fma(p, r, 1.0f / 720);
  p = fma(p, r, 1.0f / 120);
  p = fma(p, r, 1.0f / 24);
  p = fma(p, r, 1.0f / 6);
  p = fma(p, r, 0.5f);
  p = fma(p * r, r, r);
  const Vec two = exp2(safe);
  return where(greater(Vec(-20.0f), x), Vec(-1.0f), fma(two, p, two - Vec(1.0f)));
}

// ln(1 + u) for u >= -1 + 2^-24 and finite, accurate relative to itself near 0
inline Vec log1p(Vec u) {
  Vec m;
  const Vec t = Vec(1.0f) + u;
  const Vec e = split_exponent(t, m);
  const Vec near = u / (u + Vec(2.0f)), far = (m - Vec(1.0f)) / (m + Vec(1.0f));
  const Vec s = where(equal(e, Vec(0.0f)), near, far), s2 = s * s;  // |s| <= 1/5
  Vec p(2.0f / 11);
  p = fma(p, s2, 2.0f / 9);
  p = fma(p, s2, 2.0f / 7);
  p = fma(p, s2, 2.0f / 5);
  p = fma(p, s2, 2.0f / 3);
  p = fma(p * s2, s, s + s);
  return fma(e, Vec(kLn2), p);
}

// tanh, accurate relative to itself near 0
inline Vec tanh(Vec x) {
  const Vec a = abs(x), t = expm1(Vec(-2.0f) * a);  // in (-1, 0]
  const Vec y = Vec(0.0f) - t / (t + Vec(2.0f));
  return where(greater(Vec(0.0f), x), Vec(0.0f) - y, y);
}

// p += x
inline void accumulate(float* p, Vec x) { (Vec::load(p) + x).store(p); }

// Denormal results cost a hundred cycles each and say nothing beside a maximum of 1.
struct FlushDenormals {
#if defined(SGCD_AVX512) || defined(SGCD_AVX2)
  const unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#else
  FlushDenormals() {}
#endif
};

}  // namespace
