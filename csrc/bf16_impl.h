// Conversion to bf16, rounding to nearest even, and back.
#pragma once

#include "tile_kernels.h"
#include "vec.h"

namespace sgcd {
namespace {

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN: rounding could carry it into an infinity
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

#if defined(SGCD_AVX512)

inline __m512i bf16_bits(__m512 x) {  // rounded to nearest even, in the upper halves
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

inline void store_bf16(Vec x, uint16_t* p) {
  const __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_bits(x.v), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
inline Vec load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

#else

inline void store_bf16(Vec x, uint16_t* p) {
  float lanes[Vec::width];
  x.store(lanes);
  for (int i = 0; i < Vec::width; i++) p[i] = to_bf16(lanes[i]);
}
inline Vec load_bf16(const uint16_t* p) {
  float lanes[Vec::width];
  for (int i = 0; i < Vec::width; i++) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    __builtin_memcpy(&lanes[i], &bits, 4);
  }
  return Vec::load(lanes);
}

#endif

#if defined(SGCD_AVX512)

void round_tile(const float* dz, int count, uint16_t* rows, int64_t ld, uint16_t* pairs) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int v = 0; v < count; v += 2) {
    for (int i = 0; i < kTile; i += 16) {
      const __m512i a = bf16_bits(_mm512_loadu_ps(dz + v * kTile + i));
      const bool two = v + 1 < count;
      const __m512i b = two ? bf16_bits(_mm512_loadu_ps(dz + (v + 1) * kTile + i)) : _mm512_setzero_si512();
      const __m512i low = _mm512_srli_epi32(a, 16);
      if (rows) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + v * ld + i), _mm512_cvtepi32_epi16(low));
        if (two) {
          const __m512i high = _mm512_srli_epi32(b, 16);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + (v + 1) * ld + i), _mm512_cvtepi32_epi16(high));
        }
      }
      if (pairs) {
        const __m512i both = _mm512_or_si512(low, _mm512_and_si512(b, upper));
        _mm512_storeu_si512(pairs + v * kTile + 2 * i, both);
      }
    }
  }
}

#else

void round_tile(const float* dz, int count, uint16_t* rows, int64_t ld, uint16_t* pairs) {
  for (int v = 0; v < count; v += 2) {
    for (int i = 0; i < kTile; i++) {
      const bool two = v + 1 < count;
      const uint16_t a = to_bf16(dz[v * kTile + i]), b = two ? to_bf16(dz[(v + 1) * kTile + i]) : uint16_t{0};
      if (rows) rows[v * ld + i] = a;
      if (rows && two) rows[(v + 1) * ld + i] = b;
      if (pairs) {
        pairs[v * kTile + 2 * i] = a;
        pairs[v * kTile + 2 * i + 1] = b;
      }
    }
  }
}

#endif

void round_row(const float* x, int64_t count, uint16_t* out) {
  int64_t i = 0;
#if defined(SGCD_AVX512)
  for (; i + 16 <= count; i += 16) {
    const __m512i upper = _mm512_srli_epi32(bf16_bits(_mm512_loadu_ps(x + i)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtepi32_epi16(upper));
  }
#endif
  for (; i < count; i++) out[i] = to_bf16(x[i]);
}

}  // namespace
}  // namespace sgcd
