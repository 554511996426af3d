// The instruction sets of this processor, detected once at run time.
#pragma once

#include "products.h"
#include "tile_kernels.h"

namespace sgcd {

struct Isa {
  const char* name;            // amx, avx512_bf16, avx512, avx2 or portable: the path that runs
  const TileKernels* kernels;  // never null
  bool has_amx;                // tile registers, in which the library multiplies bf16
  Product fp32, bf16;          // our own products, or null where the library's are used or there are none
};

const Isa& cpu_isa();

inline const TileKernels& tile_kernels() { return *cpu_isa().kernels; }

}  // namespace sgcd
