#include "core/shared_memory/peer.h"

#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <mutex>
#include <string>

#include "core/base/failure.h"

namespace paceline {
namespace {

std::mutex own_mutex;
std::map<int, Arena*>& own_arenas() {
  static auto* arenas = new std::map<int, Arena*>;  // outlives every static destructor
  return *arenas;
}

}  // namespace

void HostPeer::enter(int control_fd, Arena* arena) {
  const std::lock_guard lock(own_mutex);
  own_arenas()[control_fd] = arena;
}

void HostPeer::leave(int control_fd) {
  const std::lock_guard lock(own_mutex);
  own_arenas().erase(control_fd);
}

HostPeer::HostPeer(int pid, int control_fd) : pid_(pid), mappings_(Control::num_slots) {
  if (pid == getpid()) {
    const std::lock_guard lock(own_mutex);
    const auto found = own_arenas().find(control_fd);
    if (found == own_arenas().end())
      throw Failed({FailureKind::config, -1, "no engine of this process has that control page"});
    same_process_ = found->second;
    control_ = &same_process_->control();
    return;
  }
  mapped_control_ = std::make_unique<Segment>(pid, control_fd, sizeof(Control));
  control_ = reinterpret_cast<Control*>(mapped_control_->base());
  if (control_->magic != Control::expected_magic)
    throw Failed({FailureKind::config, -1,
                  "process " + std::to_string(pid) + " runs another version of Paceline's core"});
  pidfd_ = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
}

HostPeer::~HostPeer() {
  if (pidfd_ >= 0) close(pidfd_);
}

std::byte* HostPeer::resolve(const Location& location, std::size_t num_bytes) {
  const auto gone = [&] {
    return Failed({FailureKind::protocol, -1,
                   "a buffer of process " + std::to_string(pid_) + " is no longer in shared memory"});
  };
  if (location.slot >= mappings_.size()) throw gone();
  if (same_process_) {
    if (std::byte* p = same_process_->resolve(location)) return p;
    throw gone();
  }
  Mapping& m = mappings_[location.slot];
  if (m.generation != location.generation || !m.segment) {
    Control::Slot& slot = control_->slots[location.slot];
    m = {};
    if (slot.generation.load() != location.generation) throw gone();
    m.segment = std::make_unique<Segment>(pid_, slot.fd.load(), slot.num_bytes.load());
    if (slot.generation.load() != location.generation) throw gone();  // closed while it was being opened
    m.generation = location.generation;
  }
  if (location.offset > m.segment->num_bytes() || num_bytes > m.segment->num_bytes() - location.offset)
    throw gone();
  return m.segment->base() + location.offset;
}

void HostPeer::drop_stale() {
  for (std::uint32_t s = 0; s < mappings_.size(); ++s)
    if (mappings_[s].segment && control_->slots[s].generation.load() != mappings_[s].generation)
      mappings_[s] = {};
}

bool HostPeer::is_alive() {
  if (same_process_ || !was_alive_) return was_alive_;
  if (pidfd_ >= 0) {
    pollfd p{pidfd_, POLLIN, 0};
    was_alive_ = poll(&p, 1, 0) != 1;
  } else {
    was_alive_ = kill(pid_, 0) == 0 || errno == EPERM;
  }
  return was_alive_;
}

}  // namespace paceline
