#define PACELINE_ISA generic
#include "core/base/reduce_kernels.h"
