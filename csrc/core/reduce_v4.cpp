#define PACELINE_ISA v4
#include "core/reduce_kernels.h"
