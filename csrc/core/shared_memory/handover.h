// Copying into memory that other cores read. A store to a line which another core has read takes a few nanoseconds
// while the two share a cache, and ten times that while they do not; a store past the caches does not care, but then
// the line has to come from memory. Virtual machines move between the two from second to second.
#pragma once
#include <cstddef>
#include <cstdint>

namespace paceline {

class Handover {
 public:
  // Copies, by whichever way has been cheaper lately; now and then by the other one, to know. `to` is aligned to 64
  // bytes. What is copied may be published right after.
  void copy(std::byte* to, const std::byte* from, std::size_t num_bytes);
  // Whether the next copies go past the caches.
  bool is_far() const { return cost_[false].least() > cost_[true].least() + reading_costs; }

 private:
  // What reading from memory instead of a near cache costs at most, ns a line.
  static constexpr double reading_costs = 8.0;

  struct Cost {  // of storing, ns a line; the less of the last two, because a copy may have been interrupted
    double last = 0.0, before = 0.0;
    double least() const { return last < before ? last : before; }
  } cost_[2];  // through the caches, past them
  std::uint32_t num_copies_ = 0;
};

}  // namespace paceline
