#include "core/network/plan.h"

#include "core/base/failure.h"

namespace paceline {

Plan Plan::parse(const std::vector<std::int64_t>& words, int num_ranks) {
  std::size_t at = 0;
  const auto wrong = [&] {
    return Failed({FailureKind::config, -1, "the program is damaged at word " + std::to_string(at)});
  };
  const auto take = [&](std::int64_t low, std::int64_t high) {
    if (at >= words.size() || words[at] < low || words[at] > high) throw wrong();
    return words[at++];
  };
  constexpr std::int64_t huge = std::int64_t{1} << 48;
  Plan plan;
  plan.scratch_bytes = static_cast<std::size_t>(take(0, huge));
  plan.output_bytes = static_cast<std::size_t>(take(0, huge));
  plan.num_lanes = static_cast<int>(take(0, 1 << 20));
  const std::int64_t count = take(0, 1 << 24);
  for (std::int64_t i = 0; i < count; ++i) {
    Instruction one{};
    one.verb = static_cast<Verb>(take(0, static_cast<std::int64_t>(Verb::reduce)));
    if (one.verb >= Verb::expose && one.verb <= Verb::reclaim) throw wrong();  // needs memory that peers reach
    one.lane = static_cast<int>(take(0, plan.num_lanes - 1));
    one.channel = static_cast<int>(take(0, 255));
    one.from = static_cast<int>(take(-1, num_ranks - 1));
    one.to = static_cast<int>(take(-1, num_ranks - 1));
    one.num_bytes = static_cast<std::size_t>(take(0, huge));
    std::int64_t lengths[4];
    for (auto& n : lengths) n = take(0, 1 << 24);
    Pieces* lists[3] = {&one.destination, &one.source, &one.other};
    for (int k = 0; k < 3; ++k)
      for (std::int64_t j = 0; j < lengths[k]; ++j) {
        const auto memory = static_cast<Memory>(take(0, 2));
        const auto offset = static_cast<std::size_t>(take(0, huge));
        lists[k]->push_back({memory, offset, static_cast<std::size_t>(take(0, huge))});
      }
    for (std::int64_t j = 0; j < lengths[3]; ++j) one.after.push_back(static_cast<int>(take(0, count - 1)));
    plan.instructions.push_back(std::move(one));
  }
  if (at != words.size()) throw wrong();
  return plan;
}

}  // namespace paceline
