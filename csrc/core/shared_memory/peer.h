// Another process of this host: its doorbell, its shared memory, and whether it is alive.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/shared_memory/arena.h"
#include "core/shared_memory/control.h"

namespace paceline {

class HostPeer {
 public:
  // Opens the control page `control_fd` of process `pid`. The pid of this process gives its own arena (ranks
  // as threads). Throws Failed(config) if it cannot be opened or has another layout.
  HostPeer(int pid, int control_fd);
  ~HostPeer();
  HostPeer(const HostPeer&) = delete;
  HostPeer& operator=(const HostPeer&) = delete;

  // Wakes the process if it sleeps. To be called after publishing with sequentially consistent stores.
  void ring() { control_->doorbell.ring(); }

  // The address of `location` here; maps its segment when first met. Throws Failed(protocol) when the segment
  // is gone or the range does not fit.
  std::byte* resolve(const Location& location, std::size_t num_bytes);

  bool is_alive();
  std::uint32_t core() const { return control_->doorbell.core.load(std::memory_order_relaxed); }
  std::uint32_t beat() const { return control_->doorbell.beat.load(std::memory_order_relaxed); }
  int pid() const { return pid_; }
  // Unmaps segments that their owner has closed.
  void drop_stale();

  // Registers an arena of this process by the descriptor of its control page, so that ranks which are threads
  // of one process find each other.
  static void enter(int control_fd, Arena* arena);
  static void leave(int control_fd);

 private:
  struct Mapping {
    std::uint32_t generation = 0;
    std::unique_ptr<Segment> segment;
  };

  int pid_;
  int pidfd_ = -1;
  bool was_alive_ = true;
  Arena* same_process_ = nullptr;
  std::unique_ptr<Segment> mapped_control_;
  Control* control_ = nullptr;
  std::vector<Mapping> mappings_;
};

}  // namespace paceline
