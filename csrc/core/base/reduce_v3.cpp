#define PACELINE_ISA v3
#include "core/base/reduce_kernels.h"
