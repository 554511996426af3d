// Compiled for AVX2 and FMA whatever the command line says, and run only where the processor has them.
#include "tile_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SGCD_AVX2  // the compiler does not define its own macro for a pragma
#pragma GCC target("avx2,fma")
#define SGCD_TILE_KERNELS tile_kernels_avx2
#define SGCD_NAME "avx2"
#include "tile_kernels_impl.h"
#else
const sgcd::TileKernels* sgcd::tile_kernels_avx2() { return nullptr; }
#endif
