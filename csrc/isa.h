// What this processor has, found once at run time.
#pragma once

#include "folds.h"
#include "gemm_avx2.h"

namespace sgcd {

struct Isa {
  const char* name;      // amx, avx512_bf16, avx512, avx2 or portable: the path that runs
  const Folds* folds;    // never null
  bool bf16;             // multiplies bf16 into fp32
  FloatProduct product;  // our own fp32 product, or null where the library's is used
};

const Isa& cpu_isa();

}  // namespace sgcd
