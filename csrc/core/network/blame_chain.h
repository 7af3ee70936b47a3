// Finds the rank that is to blame for a late operation. The rank that is waited for may itself wait for
// another, which waits for a third. So every rank is asked which one it waits for, and the blame follows that
// chain to the rank that does not answer or that waits for none. Deadlines alone cannot tell: those of ranks
// in the middle of the chain may pass later.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "core/engine/group.h"
#include "core/engine/transport.h"
#include "core/network/direct.h"

namespace paceline {

class BlameChain final : public Respondent {
 public:
  // `ranks` outlives this object. `find_awaited` answers as Respondent::awaited_rank, in the group's
  // numbering.
  BlameChain(const GroupTransport& ranks, std::function<int()> find_awaited);
  ~BlameChain() override;
  BlameChain(const BlameChain&) = delete;
  BlameChain& operator=(const BlameChain&) = delete;

  // The timeout of `op`, the running operation of `group`, whose ranks are numbered as those of `ranks`. None
  // before the deadline, and none before peers had time to answer. To be called whenever nothing moves.
  // Questions go out a little before the deadline, so that a stopped peer is named in time.
  Failure judge(const Group& group, const Operation& op, Nanoseconds now);

  int awaited_rank() const override;
  void on_answer(int peer, std::uint64_t question, int awaited) override;

  std::function<int()> find_awaited;

 private:
  static constexpr int silent = -3;  // the rank has not answered

  void ask(const Operation& op, Nanoseconds now);
  int group_rank(int world_rank) const;
  int end_of_chain(int first) const;
  Failure verdict(const Group& group, const Operation& op, Nanoseconds now) const;

  const GroupTransport& ranks_;
  std::vector<int>
      answers_;  // by rank: the rank that it waits for, in the group's numbering, or a special value
  int num_silent_ = 0;
  std::uint64_t question_ = 0;
  std::uint64_t asked_about_ = 0;  // an operation's number
  Nanoseconds asked_at_ = 0;
};

}  // namespace paceline
