// Reusable blocks of one size for slices in transit, so that a running job touches no new pages.
#pragma once
#include <cstddef>
#include <memory>
#include <vector>

namespace paceline {

class Blocks {
 public:
  static constexpr std::size_t block_bytes = 256 << 10;
  using Block = std::unique_ptr<std::byte[]>;

  Block take() {
    if (free_.empty()) return std::make_unique_for_overwrite<std::byte[]>(block_bytes);
    Block block = std::move(free_.back());
    free_.pop_back();
    return block;
  }
  void give(Block block) {
    if (block && free_.size() < 64) free_.push_back(std::move(block));
  }

 private:
  std::vector<Block> free_;
};

}  // namespace paceline
