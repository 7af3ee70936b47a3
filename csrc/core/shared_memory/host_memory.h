// The memory that a process shares with the other processes of its host: its own arena, and what it opened of
// theirs.
#pragma once
#include <map>
#include <memory>
#include <utility>

#include "core/base/fork_guard.h"
#include "core/engine/host.h"
#include "core/shared_memory/arena.h"
#include "core/shared_memory/cache_aware_copy.h"
#include "core/shared_memory/peer.h"

namespace paceline {

// Outlives the engine that it is given to. Everything but `arena` and `free` is used under that engine's
// lock.
class HostMemory final : public Host {
 public:
  HostMemory() { HostPeer::enter(arena_.control_fd(), &arena_); }
  ~HostMemory() override { HostPeer::leave(arena_.control_fd()); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  Arena& arena() { return arena_; }
  // As Arena::free, but in a forked child, which shares the memory with its parent, nothing happens.
  void free(void* pointer) {
    if (!fork_.is_child()) arena_.free(pointer);
  }
  // The process `pid` by the descriptor of its control page; opened when first met.
  std::shared_ptr<HostPeer> peer(int pid, int control_fd);
  // How operations put data where peers read it.
  CacheAwareCopy& copier() { return copier_; }

  Doorbell& doorbell() override { return arena_.control().doorbell; }
  bool has_peers() const override { return !peers_.empty(); }
  bool is_peer_on(int core) const override;
  void sweep() override;

 private:
  Arena arena_;
  ForkGuard fork_;
  CacheAwareCopy copier_;
  std::map<std::pair<int, int>, std::weak_ptr<HostPeer>> peers_;  // by process and descriptor
};

}  // namespace paceline
