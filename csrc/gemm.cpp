#include "gemm.h"

#include <ATen/native/CPUBlas.h>

#include "isa.h"

namespace sgcd {

bool has_bf16_products() { return cpu_isa().bf16 && at::native::cpublas::could_pack(at::kBFloat16); }

bool has_transposed_products(Math math) { return math == Math::kFloat && cpu_isa().product; }

void multiply(Math math, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb,
              float* c, int64_t ldc, bool add) {
  if (math == Math::kBf16) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, static_cast<const at::BFloat16*>(a),
                                static_cast<const at::BFloat16*>(b), c, true);
  } else if (const FloatProduct product = cpu_isa().product) {
    product(m, n, k, static_cast<const float*>(a), lda, false, static_cast<const float*>(b), ldb, c, ldc, add);
  } else {
    // Without micro-kernels for this processor, the library does the same by its BLAS.
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, static_cast<const float*>(a),
                                static_cast<const float*>(b), c, false);
  }
}

void multiply_transposed(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                         float* c, int64_t ldc, bool add) {
  cpu_isa().product(m, n, k, a, lda, true, b, ldb, c, ldc, add);
}

void release_multiplier() { at::native::cpublas::brgemm_release(true); }

}  // namespace sgcd
