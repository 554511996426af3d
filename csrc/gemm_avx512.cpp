// Products for AVX-512, in fp32 and, where the processor multiplies pairs of it, in bf16.
#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about undefined operands in its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#include <immintrin.h>

#include "gemm_impl.h"

namespace sgcd {
namespace {

struct Float16 {  // sixteen floats
  using Vector = __m512;
  static constexpr int64_t width = 16, rows = 8, depth = 512;
  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512 load(const float* p) { return _mm512_loadu_ps(p); }
  static __m512 broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static __m512 add(__m512 x, __m512 y, __m512 sum) { return _mm512_fmadd_ps(x, y, sum); }
  static void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }
};

struct Bf16Pairs : Float16 {
  static __m512 add(__m512 x, __m512 y, __m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }
};

}  // namespace

Product float_product_avx512() { return product<Float16>; }
Product bf16_product_avx512() { return product<Bf16Pairs>; }

}  // namespace sgcd

#else
sgcd::Product sgcd::float_product_avx512() { return nullptr; }
sgcd::Product sgcd::bf16_product_avx512() { return nullptr; }
#endif
