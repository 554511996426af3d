// Compiled for AVX-512 whatever the command line says, and run only where the processor has it.
#include "folds.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SGCD_AVX512  // the compiler does not define its own macro for a pragma
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SGCD_FOLDS folds_avx512
#define SGCD_NAME "avx512"
#include "folds_impl.h"
#else
const sgcd::Folds* sgcd::folds_avx512() { return nullptr; }
#endif
