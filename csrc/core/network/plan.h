// One rank's part of a lowered program, with chunks resolved to byte ranges: what the executor runs.
// The words are those of src/paceline/schedule/lowering/lowered.py, where the format is documented;
// src/paceline/comm/native/plan.py fills a Plan from a lowered program, field by field and by name.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace paceline {

// The verbs that the executor runs. The others of lowered.py (expose, read, read_reduce, reclaim) need memory
// that peers can address; no executor runs them.
enum class Verb : std::uint8_t { send, recv, recv_reduce, recv_send, recv_reduce_send, copy, reduce };
const std::vector<std::string>& verb_names();  // in the order of the values
Verb verb_named(const std::string& name);      // throws Failed(config) for any other name

struct Plan {
  enum Buffer : std::uint8_t { input, output, scratch };
  struct BufferRange {
    Buffer buffer;
    std::size_t offset, num_bytes;
  };
  using Ranges = std::vector<BufferRange>;
  struct Instruction {
    Verb verb = Verb::copy;
    int lane = 0, channel = 0;
    int recv_peer = -1, send_peer = -1;  // ranks; -1: none
    std::size_t num_bytes = 0;           // of its message, or of what it moves locally
    Ranges dst, src, operand;
    std::vector<int> deps;  // earlier instructions that must be done
  };

  int num_ranks = 1;
  std::size_t scratch_bytes = 0;
  std::size_t output_bytes = 0;  // the part of the output that a mean divides at the end
  int num_lanes = 0;
  std::vector<Instruction> instructions;

  // Appends an instruction; throws Failed(config) for a value that no executor could run.
  void add(Instruction instruction);
};

}  // namespace paceline
