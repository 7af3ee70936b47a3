#include "core/network/blame_chain.h"

#include <algorithm>

#include "core/engine/group.h"

namespace paceline {

Inquiry::Inquiry(Transport& transport, std::uint32_t space, int rank, std::vector<int> world_ranks,
                 std::function<int()> whom)
    : waits_for(std::move(whom)),
      transport_(transport),
      space_(space),
      rank_(rank),
      world_ranks_(std::move(world_ranks)) {
  transport_.set_respondent(space_, this);
}

Inquiry::~Inquiry() { transport_.set_respondent(space_, nullptr); }

int Inquiry::whom() const {
  const int r = waits_for();
  if (r >= static_cast<int>(world_ranks_.size())) return somebody;  // a culprit from outside
  return r < 0 ? r : world_ranks_[static_cast<std::size_t>(r)];
}

int Inquiry::group_rank(int world_rank) const {
  const auto found = std::ranges::find(world_ranks_, world_rank);
  return found == world_ranks_.end() ? somebody : static_cast<int>(found - world_ranks_.begin());
}

void Inquiry::heard(int peer, std::uint64_t question, int whom) {
  const int r = group_rank(peer);
  if (question != question_ || r < 0 || answers_[static_cast<std::size_t>(r)] != silent) return;
  answers_[static_cast<std::size_t>(r)] = whom < 0 ? whom : group_rank(whom);
  --num_silent_;
}

void Inquiry::ask(const Operation& op, Nanoseconds now) {
  asked_about_ = op.sequence;
  asked_at_ = now;
  ++question_;
  answers_.assign(world_ranks_.size(), silent);
  answers_[static_cast<std::size_t>(rank_)] = somebody;
  num_silent_ = static_cast<int>(world_ranks_.size()) - 1;
  for (std::size_t r = 0; r < world_ranks_.size(); ++r)
    if (static_cast<int>(r) != rank_) transport_.ask(world_ranks_[r], space_, question_);
}

Failure Inquiry::judge(const Session& session, const Operation& op, Nanoseconds now) {
  const Nanoseconds lead = std::min(patience, std::max<Nanoseconds>(0, (op.deadline - op.started) / 4));
  if (now < op.deadline - lead) return {};
  if (asked_at_ == 0 || asked_about_ != op.sequence) ask(op, now);
  if (now < op.deadline) return {};
  if (num_silent_ > 0) return now - asked_at_ < patience ? Failure{} : verdict(session, op, now);
  if (asked_at_ >= op.deadline) return verdict(session, op, now);
  ask(op, now);  // what they said before the deadline may be out of date
  return {};
}

// The rank at which the chain of those who wait ends, or -1 if it ends nowhere.
int Inquiry::end_of_chain(int first) const {
  std::vector<bool> is_known(answers_.size());
  for (int r = first; r >= 0 && r != rank_ && !is_known[static_cast<std::size_t>(r)];) {
    is_known[static_cast<std::size_t>(r)] = true;
    const int next = answers_[static_cast<std::size_t>(r)];
    if (next == silent || next == nobody) return r;
    r = next;
  }
  return -1;
}

Failure Inquiry::verdict(const Session& session, const Operation& op, Nanoseconds now) const {
  const int first = waits_for();
  int culprit = end_of_chain(first);
  for (const int kind : {silent, static_cast<int>(nobody)})
    if (const auto found = std::ranges::find(answers_, kind); culprit < 0 && found != answers_.end())
      culprit = static_cast<int>(found - answers_.begin());
  const bool is_unclear = culprit < 0;
  if (is_unclear) culprit = first < 0 ? -1 : first;

  const double waited_s = static_cast<double>(now - op.started) / second_ns;
  const auto name = [&](int r) { return r < 0 ? std::string("the peers") : session.name(r); };
  std::string why = session.describe(op) + ": nothing from " + name(first) + " for " +
                    std::to_string(waited_s).substr(0, 5) + " s";
  if (culprit != first && culprit >= 0) why += ", which waits for " + name(culprit);
  const std::string it = culprit != first && culprit >= 0 ? "; " + name(culprit) : "; it";
  if (is_unclear) why += "; all processes answer, and none is done: are the links slow?";
  else if (answers_[static_cast<std::size_t>(culprit)] == silent)
    why += it + " does not answer: is its process stopped, or its link down?";
  else why += it + " answers, but is in no operation: has it called this one?";
  return {FailureKind::timeout, culprit, why};
}

}  // namespace paceline
