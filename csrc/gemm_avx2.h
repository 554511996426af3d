#pragma once

#include <stdint.h>

namespace sgcd {

// As `multiply` for fp32, n a multiple of 16; a transposed is [k, m].
using FloatProduct = void (*)(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, bool transposed,
                              const float* b, int64_t ldb, float* c, int64_t ldc, bool add);

FloatProduct float_product_avx2();  // null where not compiled in

}  // namespace sgcd
