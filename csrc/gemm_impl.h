// The products of tiles, for the `Lanes` of the including file, which is compiled for one instruction set.
//
// A vector has Lanes::width columns; `rows` x 2 vectors of sums, two vectors of b and one broadcast step of a fill the
// registers. A panel of b of two vectors by `depth` steps stays in L1 for all rows of a.
#include "products.h"

namespace sgcd {
namespace {

template <class Lanes, int rows, bool transposed>
void block(int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  typename Lanes::Vector sum[rows][2];  // the compiler keeps it in memory unless the loops over it are unrolled
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) sum[r][j] = add ? Lanes::load(c + r * ldc + j * Lanes::width) : Lanes::zero();
  for (int64_t i = 0; i < k; i++) {
    const auto left = Lanes::load(b + i * ldb), right = Lanes::load(b + i * ldb + Lanes::width);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const auto x = Lanes::broadcast(transposed ? a + i * lda + r : a + r * lda + i);
      sum[r][0] = Lanes::add(x, left, sum[r][0]);
      sum[r][1] = Lanes::add(x, right, sum[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) Lanes::store(c + r * ldc + j * Lanes::width, sum[r][j]);
}

template <class Lanes, bool transposed, int most = Lanes::rows>
void rows_of(int64_t rows, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
             bool add) {
  if constexpr (most > 1)
    if (rows < most) return rows_of<Lanes, transposed, most - 1>(rows, k, a, lda, b, ldb, c, ldc, add);
  block<Lanes, most, transposed>(k, a, lda, b, ldb, c, ldc, add);
}

template <class Lanes>
void product(int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, bool transposed, const void* b, int64_t ldb,
             float* c, int64_t ldc, bool add) {
  for (int64_t j = 0; j < n; j += 2 * Lanes::width) {
    for (int64_t k0 = 0; k0 < k; k0 += Lanes::depth) {
      const int64_t deep = k - k0 < Lanes::depth ? k - k0 : Lanes::depth;
      const float* right = static_cast<const float*>(b) + k0 * ldb + j;
      for (int64_t i = 0; i < m; i += Lanes::rows) {
        const int64_t rows = m - i < Lanes::rows ? m - i : Lanes::rows;
        const float* left = static_cast<const float*>(a) + (transposed ? k0 * lda + i : i * lda + k0);
        (transposed ? rows_of<Lanes, true> : rows_of<Lanes, false>)(rows, deep, left, lda, right, ldb, c + i * ldc + j,
                                                                    ldc, add || k0 > 0);
      }
    }
  }
}

}  // namespace
}  // namespace sgcd
