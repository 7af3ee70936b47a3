#define PACELINE_ISA v3
#include "core/reduce_kernels.h"
