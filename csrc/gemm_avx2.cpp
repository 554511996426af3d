// Products of tiles for processors without AVX-512, where the library's micro-kernels do not run.
#include "gemm_avx2.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>

namespace sgcd {
namespace {

constexpr int64_t kDepthStep = 64;  // of b at a time: 64 x 64 floats stay in L1 while all rows of a pass by
constexpr int kRows = 6;            // 6 x 16 sums, two vectors of b and one broadcast element of a: all 16 registers
constexpr int64_t kColumns = 16;

template <int rows, bool transposed>
void block(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  __m256 sum[rows][2];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) sum[r][j] = add ? _mm256_loadu_ps(c + r * ldc + 8 * j) : _mm256_setzero_ps();
  for (int64_t i = 0; i < k; i++) {
    const __m256 left = _mm256_loadu_ps(b + i * ldb), right = _mm256_loadu_ps(b + i * ldb + 8);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      const __m256 x = _mm256_broadcast_ss(transposed ? a + i * lda + r : a + r * lda + i);
      sum[r][0] = _mm256_fmadd_ps(x, left, sum[r][0]);
      sum[r][1] = _mm256_fmadd_ps(x, right, sum[r][1]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) _mm256_storeu_ps(c + r * ldc + 8 * j, sum[r][j]);
}

using Block = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, bool);
template <bool transposed>
constexpr Block kBlocks[kRows] = {block<1, transposed>, block<2, transposed>, block<3, transposed>,
                                  block<4, transposed>, block<5, transposed>, block<6, transposed>};

void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, bool transposed, const float* b,
             int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t k0 = 0; k0 < k; k0 += kDepthStep) {
    const int64_t depth = k - k0 < kDepthStep ? k - k0 : kDepthStep;
    for (int64_t i = 0; i < m; i += kRows) {
      const int64_t last = (m - i < kRows ? m - i : kRows) - 1;
      const Block rows = transposed ? kBlocks<true>[last] : kBlocks<false>[last];
      const float* left = transposed ? a + k0 * lda + i : a + i * lda + k0;
      for (int64_t j = 0; j < n; j += kColumns)
        rows(depth, left, lda, b + k0 * ldb + j, ldb, c + i * ldc + j, ldc, add || k0 > 0);
    }
  }
}

}  // namespace

FloatProduct float_product_avx2() { return product; }

}  // namespace sgcd

#else
sgcd::FloatProduct sgcd::float_product_avx2() { return nullptr; }
#endif
