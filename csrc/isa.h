// What this processor has, found once at run time.
#pragma once

#include "folds.h"
#include "products.h"

namespace sgcd {

struct Isa {
  const char* name;    // amx, avx512_bf16, avx512, avx2 or portable: the path that runs
  const Folds* folds;  // never null
  bool tiles;          // has tile registers, which the library multiplies bf16 in
  Product fp32, bf16;  // our own products, or null where the library's are used or there are none
};

const Isa& cpu_isa();

}  // namespace sgcd
