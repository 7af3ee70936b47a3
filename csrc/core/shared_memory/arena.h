// This process's shared memory: anonymous segments that vanish with their last user, whatever kills it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/shared_memory/control.h"

namespace paceline {

// One memfd, mapped. Closed and unmapped by the destructor; mappings of peers stay valid until they drop
// them.
class Segment {
 public:
  explicit Segment(std::size_t num_bytes);
  // Opens a segment of another process. Throws Failed(config) if this is not permitted.
  Segment(int pid, int fd, std::size_t num_bytes);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  std::byte* base() const { return base_; }
  std::size_t num_bytes() const { return num_bytes_; }
  int fd() const { return fd_; }

 private:
  int fd_ = -1;
  std::byte* base_ = nullptr;
  std::size_t num_bytes_ = 0;
};

// First-fit allocation from a few large segments, listed in the control page so that peers can map them.
class Arena {
 public:
  Arena();

  // Zeroed, aligned to 64 bytes, or to pages from one page on. Throws Failed(config) when memory runs out.
  void* allocate(std::size_t num_bytes);
  void free(void* pointer);

  // The place of [pointer, pointer + num_bytes); Location::nowhere if it is private memory.
  Location locate(const void* pointer, std::size_t num_bytes) const;
  std::byte* resolve(const Location& location) const;

  Control& control() const { return *reinterpret_cast<Control*>(control_.base()); }
  int control_fd() const { return control_.fd(); }
  std::size_t num_segments() const;
  std::size_t allocated_bytes() const;

 private:
  struct Piece {
    std::size_t num_bytes;
    bool is_free;
    bool is_dirty;  // was used before, so must be zeroed
  };
  struct SegmentEntry {
    std::unique_ptr<Segment> segment;
    std::map<std::size_t, Piece> pieces;  // by offset; neighbours that are free are merged
    std::size_t used_bytes = 0;
    std::uint32_t generation = 0;
  };

  void* take(std::uint32_t slot, std::size_t num_bytes, std::size_t alignment);
  std::uint32_t add_segment(std::size_t num_bytes);

  mutable std::mutex mutex_;
  Segment control_;
  std::vector<SegmentEntry> entries_;  // by slot; grows to Control::num_slots
  std::uint32_t next_generation_ = 1;
};

}  // namespace paceline
