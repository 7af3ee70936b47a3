// Copying into memory that other cores read. A store to a line that another core has read takes a few
// nanoseconds if the two cores share a cache, and ten times that if they do not. A store past the caches
// costs the same in both cases, but the reader must then fetch the line from memory. Which way is cheaper
// depends on where the cores are, and virtual machines move between cores from second to second, so the copy
// measures itself.
#pragma once
#include <cstddef>
#include <cstdint>

namespace paceline {

class CacheAwareCopy {
 public:
  // Copies in the way that was cheaper lately, and occasionally in the other way, to measure it. `to` is
  // aligned to 64 bytes. The copied bytes may be published right after.
  void copy(std::byte* to, const std::byte* from, std::size_t num_bytes);
  // Whether the next copies go past the caches.
  bool goes_past_caches() const { return cost_[false].least() > cost_[true].least() + reading_cost; }

 private:
  // What reading a line from memory instead of a near cache costs at most, in ns.
  static constexpr double reading_cost = 8.0;

  // Of storing a line, in ns: the lower of the last two measurements, because a copy may have been
  // interrupted.
  struct Cost {
    double last = 0.0, before = 0.0;
    double least() const { return last < before ? last : before; }
  };
  Cost cost_[2];  // through the caches, past them
  std::uint32_t num_copies_ = 0;
};

}  // namespace paceline
