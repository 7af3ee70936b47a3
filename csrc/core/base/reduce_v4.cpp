#define PACELINE_ISA v4
#include "core/base/reduce_kernels.h"
