#define PACELINE_ISA generic
#include "core/reduce_kernels.h"
