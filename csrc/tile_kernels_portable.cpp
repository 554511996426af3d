// Plain loops: arm64, old x86, any other compiler.
#define SGCD_TILE_KERNELS tile_kernels_portable
#define SGCD_NAME "portable"
#include "tile_kernels_impl.h"
