// Products for processors without AVX-512, where the library's micro-kernels do not run.
#include "products.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>

#include "gemm_impl.h"

namespace sgcd {
namespace {

struct Float8 {
  using Vector = __m256;
  static constexpr int64_t width = 8, rows = 6, depth = 64;  // all 16 registers
  static __m256 zero() { return _mm256_setzero_ps(); }
  static __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static __m256 add(__m256 x, __m256 y, __m256 sum) { return _mm256_fmadd_ps(x, y, sum); }
  static void store(float* p, __m256 x) { _mm256_storeu_ps(p, x); }
};

}  // namespace

Product float_product_avx2() { return product<Float8>; }

}  // namespace sgcd

#else
sgcd::Product sgcd::float_product_avx2() { return nullptr; }
#endif
