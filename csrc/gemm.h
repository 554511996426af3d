// Small matrix products of tiles, by PyTorch's exported micro-kernels or our own.
#pragma once

#include <stdint.h>

namespace sgcd {

// The dtype in which tiles are multiplied: bf16 if the processor multiplies it into fp32, else fp32.
enum class Math { kFloat, kBf16 };

inline int64_t element_size(Math math) { return math == Math::kBf16 ? 2 : 4; }

bool has_bf16_products();

// c [m, n] (+)= a [m, k] b [k, n], fp32 out, n a multiple of 32. Rows of a are apart by lda elements, rows of c by ldc.
// For bf16, k and lda are even and b holds pairs of its rows, b[k/2][n][2], pairs of rows apart by 2 ldb elements.
void multiply(Math math, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* b, int64_t ldb,
              float* c, int64_t ldc, bool add);

// The same with a [k, m], where the products are our own: rows of a, or for bf16 pairs of rows, a[k/2][m][2], are apart
// by lda elements, or 2 lda.
bool has_transposed_products(Math math);
void multiply_transposed(Math math, int64_t m, int64_t n, int64_t k, const void* a, int64_t lda, const void* b,
                         int64_t ldb, float* c, int64_t ldc, bool add);

// Every thread that multiplied calls this before other work, because the tile registers hold state.
void release_multiplier();

}  // namespace sgcd
