// Whose fault it is that an operation is late. The rank that is waited for may itself wait for another, which waits
// for a third: so everybody is asked whom it waits for, and the blame goes down that chain, to the rank that does
// not answer or that waits for nobody. Deadlines alone cannot tell: those of ranks in the middle may pass later.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/engine/operation.h"
#include "core/network/transport.h"

namespace paceline {

class Session;

class Inquiry final : public Respondent {
 public:
  static constexpr Nanoseconds patience = second_ns;  // for an answer

  // `world_ranks[r]` is the transport's number of the group's rank r. `whom` says what Respondent::whom does, in
  // the numbering of the group.
  Inquiry(Transport& transport, std::uint32_t space, int rank, std::vector<int> world_ranks,
          std::function<int()> whom);
  ~Inquiry() override;
  Inquiry(const Inquiry&) = delete;
  Inquiry& operator=(const Inquiry&) = delete;

  // The timeout of `op`, the running operation of `session`, whose ranks are numbered like the group's; none before
  // its deadline, and none before peers had time to answer. To be called whenever nothing moves. Questions go out
  // a little before the deadline, so that a stopped peer is named in time.
  Failure judge(const Session& session, const Operation& op, Nanoseconds now);

  int whom() const override;
  void heard(int peer, std::uint64_t question, int whom) override;

  std::function<int()> waits_for;

 private:
  static constexpr int silent = -3;

  void ask(const Operation& op, Nanoseconds now);
  int group_rank(int world_rank) const;
  int end_of_chain(int first) const;
  Failure verdict(const Session& session, const Operation& op, Nanoseconds now) const;

  Transport& transport_;
  std::uint32_t space_;
  int rank_;
  std::vector<int> world_ranks_;
  std::vector<int> answers_;  // by rank: whom it waits for, in the group's numbering, or a special value
  int num_silent_ = 0;
  std::uint64_t question_ = 0;
  std::uint64_t asked_about_ = 0;  // an operation's number
  Nanoseconds asked_at_ = 0;
};

}  // namespace paceline
