// The page that a process shows to the other processes of its host, and the names of places in its memory.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "core/engine/doorbell.h"

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
  static constexpr std::uint64_t expected_magic =
      0x33656e696c656361;  // changes with the layout of shared memory

  // A segment that can be opened as /proc/PID/fd/FD. A generation of 0 means none.
  struct Slot {
    std::atomic<std::uint32_t> generation;
    std::atomic<std::int32_t> fd;
    std::atomic<std::uint64_t> num_bytes;
  };

  std::uint64_t magic;
  Doorbell doorbell;
  alignas(64) Slot slots[num_slots];
};
static_assert(sizeof(Control) == 320 + Control::num_slots * sizeof(Control::Slot));

}  // namespace paceline
