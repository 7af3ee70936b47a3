// One rank's list of instructions, resolved to byte ranges: what the executor runs. See schedule/lowered.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace paceline {

enum class Verb : std::uint8_t {
  send, receive, receive_reduce, receive_send, receive_reduce_send, expose, read, read_reduce, reclaim, copy, reduce,
};

struct Plan {
  enum Memory : std::uint8_t { input, output, scratch };
  struct Piece {  // of one of the three buffers
    Memory memory;
    std::size_t offset, num_bytes;
  };
  using Pieces = std::vector<Piece>;
  struct Instruction {
    Verb verb;
    int lane, channel;
    int from = -1, to = -1;  // ranks
    std::size_t num_bytes;   // of its message, or of what it moves locally
    Pieces destination, source, other;
    std::vector<int> after;  // instructions that must be done
  };

  std::size_t scratch_bytes = 0;
  std::size_t output_bytes = 0;  // what a mean is divided in at the end
  int num_lanes = 0;
  std::vector<Instruction> instructions;

  // Words: scratch_bytes, output_bytes, lanes, number of instructions; for each instruction verb, lane, channel,
  // from, to, num_bytes, four lengths, the pieces as (memory, offset, num_bytes), then `after`. Throws Failed(config).
  static Plan parse(const std::vector<std::int64_t>& words, int num_ranks);
};

}  // namespace paceline
