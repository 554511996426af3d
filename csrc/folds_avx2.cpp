// Compiled for AVX2 and FMA whatever the command line says, and run only where the processor has them.
#include "folds.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SGCD_AVX2  // the compiler does not define its own macro for a pragma
#pragma GCC target("avx2,fma")
#define SGCD_FOLDS folds_avx2
#define SGCD_NAME "avx2"
#include "folds_impl.h"
#else
const sgcd::Folds* sgcd::folds_avx2() { return nullptr; }
#endif
