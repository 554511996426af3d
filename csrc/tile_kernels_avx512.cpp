// Compiled for AVX-512 whatever the command line says, and run only where the processor has it.
#include "tile_kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SGCD_AVX512  // the compiler does not define its own macro for a pragma
// GCC 12 warns about undefined operands in its own intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SGCD_TILE_KERNELS tile_kernels_avx512
#define SGCD_NAME "avx512"
#include "tile_kernels_impl.h"
#else
const sgcd::TileKernels* sgcd::tile_kernels_avx512() { return nullptr; }
#endif
