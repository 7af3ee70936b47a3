// Combining P contributions element by element, in one canonical order.
#pragma once
#include <cstddef>

#include "core/base/dtype.h"

namespace paceline {

// Whether `op` has a meaning for `dtype`: no bitwise operators on floats, no order on complex numbers,
// no mean of booleans.
bool is_reducible(DType dtype, ReduceOp op);

// Every destination receives ((sources[0] op sources[1]) op sources[2]) …, for `mean` divided by `divisor`
// (integers: truncated towards zero). float16 and bfloat16 accumulate in float32 and round once.
// Integers wrap. A destination may be a source; partial overlaps are not allowed.
// Reads all sources and writes all destinations in one pass over cache-sized blocks.
void reduce(DType dtype, ReduceOp op, void* const* destinations, int num_destinations,
            const void* const* sources, int num_sources, std::size_t numel, int divisor);

// to = from * factor, for buffers larger than the caches.
void scale(float* to, const float* from, std::size_t numel, float factor);

// The instruction set that `reduce` runs on: "generic", "x86-64-v3" or "x86-64-v4".
const char* reduce_isa();

}  // namespace paceline
