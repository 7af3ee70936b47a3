#include "core/network/plan.h"

#include <algorithm>

#include "core/base/failure.h"

namespace paceline {
namespace {

constexpr std::size_t most_bytes = std::size_t{1} << 48;
constexpr int most_lanes = 1 << 20;
constexpr int most_channels = 256;

bool receives(Verb verb) {
  return verb == Verb::recv || verb == Verb::recv_reduce || verb == Verb::recv_send ||
         verb == Verb::recv_reduce_send;
}
bool posts(Verb verb) {
  return verb == Verb::send || verb == Verb::recv_send || verb == Verb::recv_reduce_send;
}

}  // namespace

const std::vector<std::string>& verb_names() {
  static const std::vector<std::string> names = {
      "send", "recv", "recv_reduce", "recv_send", "recv_reduce_send", "copy", "reduce"};
  return names;
}

Verb verb_named(const std::string& name) {
  const auto& names = verb_names();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end())
    throw Failed({FailureKind::config, -1, "the executor does not run the verb '" + name + "'"});
  return static_cast<Verb>(found - names.begin());
}

void Plan::add(Instruction instruction) {
  const auto number = static_cast<int>(instructions.size());
  const auto require = [&](bool is_fine, const char* what) {
    if (is_fine) return;
    throw Failed({FailureKind::config, -1,
                  "instruction " + std::to_string(number) + ": " + what + " is out of range"});
  };
  const auto is_peer = [&](int rank, bool is_used) {
    return is_used ? rank >= 0 && rank < num_ranks : rank == -1;
  };
  require(instruction.lane >= 0 && instruction.lane < most_lanes, "lane");
  require(instruction.channel >= 0 && instruction.channel < most_channels, "channel");
  require(is_peer(instruction.recv_peer, receives(instruction.verb)), "recv_peer");
  require(is_peer(instruction.send_peer, posts(instruction.verb)), "send_peer");
  require(instruction.num_bytes <= most_bytes, "num_bytes");
  for (const Ranges* ranges : {&instruction.dst, &instruction.src, &instruction.operand})
    for (const BufferRange& range : *ranges)
      require(range.buffer <= scratch && range.offset <= most_bytes && range.num_bytes <= most_bytes,
              "a byte range");
  for (const int dependency : instruction.deps)
    require(dependency >= 0 && dependency < number, "a dependency");
  num_lanes = std::max(num_lanes, instruction.lane + 1);
  instructions.push_back(std::move(instruction));
}

}  // namespace paceline
