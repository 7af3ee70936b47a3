// What an engine must know of the other processes on its host: those that ring its doorbell.
#pragma once
#include <cstdint>

#include "core/engine/doorbell.h"

namespace paceline {

class Host {
 public:
  virtual ~Host() = default;

  // This process's own doorbell.
  virtual Doorbell& doorbell() = 0;
  virtual bool has_peers() const = 0;
  // Whether another process last waited on `core` (as sched_getcpu numbers them).
  virtual bool is_peer_on(int core) const = 0;
  // Releases what peers have given up.
  virtual void sweep() = 0;
};

}  // namespace paceline
