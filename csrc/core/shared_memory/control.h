// The page that a process shows to the other processes of its host, and how places in its memory are named.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/base/sync.h"

namespace paceline {

// A place in the shared memory of some process: which of its segments, and where in it.
struct Location {
  static constexpr std::uint32_t nowhere = 0xffffffffu;
  std::uint32_t slot = nowhere;  // nowhere: private memory, which peers cannot reach
  std::uint32_t generation = 0;  // a slot is used again after its segment is gone
  std::uint64_t offset = 0;

  bool is_shared() const { return slot != nowhere; }
};

struct Control {
  static constexpr std::uint32_t num_slots = 256;
  static constexpr std::uint64_t expected_magic = 0x33656e696c656361;  // changes with the layout of shared memory

  // A segment that can be opened as /proc/PID/fd/FD. A generation of 0 means none.
  struct Slot {
    std::atomic<std::uint32_t> generation;
    std::atomic<std::int32_t> fd;
    std::atomic<std::uint64_t> num_bytes;
  };

  std::uint64_t magic;
  // The doorbell: whoever publishes something rings if the owner sleeps. One bell for a thread that waits for an
  // operation, one for the helper that serves operations nobody waits for; `armed` says which listens.
  enum Armed : std::uint32_t { nobody, waiter, helper };
  alignas(64) std::atomic<std::uint32_t> armed;
  alignas(64) std::atomic<std::uint32_t> bells[3];
  alignas(64) std::atomic<std::uint32_t> beat;  // moves while the process runs, every 50 ms at least
  alignas(64) std::atomic<std::uint32_t> core;  // 1 + where the process last waited for an operation; 0 at first

  void ring() {
    const std::uint32_t listener = armed.load() == nobody ? std::uint32_t{nobody} : armed.exchange(nobody);
    if (listener == waiter || listener == helper) wake(static_cast<Armed>(listener));
  }
  void wake(Armed listener) {
    bells[listener].fetch_add(1);
    futex_wake_all(bells[listener]);
  }

  alignas(64) Slot slots[num_slots];
};

}  // namespace paceline
