// Plain loops: arm64, old x86, any other compiler.
#define SGCD_FOLDS folds_portable
#define SGCD_NAME "portable"
#include "folds_impl.h"
