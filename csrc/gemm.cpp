#include "gemm.h"

#include <ATen/native/CPUBlas.h>

#include "isa.h"

namespace sgcd {

namespace {

Product own(Math math) { return math == Math::kBf16 ? cpu_isa().bf16 : cpu_isa().fp32; }
int64_t steps(Math math, int64_t elements) { return math == Math::kBf16 ? elements / 2 : elements; }

}  // namespace

bool has_bf16_products() { return cpu_isa().bf16 || cpu_isa().has_amx; }

bool has_transposed_products(Math math) { return own(math); }

void multiply(Math math, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb,
              float* c, int64_t ldc, bool add) {
  if (const Product product = own(math)) {
    product(m, n, steps(math, k), a, steps(math, lda), false, b, ldb, c, ldc, add);
  } else if (math == Math::kBf16) {
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, static_cast<const at::BFloat16*>(a),
                                static_cast<const at::BFloat16*>(b), c, true);
  } else {
    // Without micro-kernels for this processor, the library uses its BLAS.
    at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, static_cast<const float*>(a), static_cast<const float*>(b),
                                c, false);
  }
}

void multiply_transposed(Math math, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* b,
                         int64_t ldb, float* c, int64_t ldc, bool add) {
  own(math)(m, n, steps(math, k), a, lda, true, b, ldb, c, ldc, add);
}

void release_multiplier() { at::native::cpublas::brgemm_release(true); }

}  // namespace sgcd
