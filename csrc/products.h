// Our own products of tiles, one file for each instruction set.
#pragma once

#include <stdint.h>

namespace sgcd {

// c [m, n] (+)= a [m, k] b [k, n] with sums in fp32, n a multiple of 32. A step of k is four bytes: an fp32 element, or
// a pair of bf16. Rows of a and b are apart by lda and ldb steps; a transposed is [k, m].
using Product = void (*)(int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, bool transposed, const void* b,
                         int64_t ldb, float* c, int64_t ldc, bool add);

Product float_product_avx2();  // null where not compiled in
Product float_product_avx512();
Product bf16_product_avx512();

}  // namespace sgcd
