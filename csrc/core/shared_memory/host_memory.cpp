#include "core/shared_memory/host_memory.h"

#include <unistd.h>

namespace paceline {

std::shared_ptr<HostPeer> HostMemory::peer(int pid, int control_fd) {
  std::weak_ptr<HostPeer>& known = peers_[{pid, control_fd}];
  std::shared_ptr<HostPeer> found = known.lock();
  if (!found) known = found = std::make_shared<HostPeer>(pid, control_fd);
  return found;
}

bool HostMemory::is_peer_on(int core) const {
  for (const auto& [key, weak] : peers_) {
    const auto peer = weak.lock();
    if (peer && peer->pid() != getpid() && peer->core() == static_cast<std::uint32_t>(core) + 1) return true;
  }
  return false;
}

void HostMemory::sweep() {
  for (auto it = peers_.begin(); it != peers_.end();) {
    if (const auto peer = it->second.lock()) {
      peer->drop_stale();
      ++it;
    } else {
      it = peers_.erase(it);
    }
  }
}

}  // namespace paceline
