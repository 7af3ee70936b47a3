// What one process needs to take part in groups: shared memory, and the engine that drives its operations.
#pragma once
#include "core/engine/engine.h"
#include "core/shared_memory/host_memory.h"

namespace paceline {

struct Process {
  HostMemory memory;
  Engine engine{memory};
};

}  // namespace paceline
