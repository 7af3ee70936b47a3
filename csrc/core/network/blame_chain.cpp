#include "core/network/blame_chain.h"

#include <algorithm>
#include <string>

namespace paceline {

BlameChain::BlameChain(const GroupTransport& ranks, std::function<int()> find_awaited)
    : find_awaited(std::move(find_awaited)), ranks_(ranks) {
  ranks_.transport->set_respondent(ranks_.space, this);
}

BlameChain::~BlameChain() { ranks_.transport->set_respondent(ranks_.space, nullptr); }

int BlameChain::awaited_rank() const {
  const int r = find_awaited();
  if (r >= ranks_.size()) return unknown;  // a culprit from outside of the group
  return r < 0 ? r : ranks_.world_rank(r);
}

int BlameChain::group_rank(int world_rank) const {
  const int r = ranks_.rank_of(world_rank);
  return r < 0 ? unknown : r;
}

void BlameChain::on_answer(int peer, std::uint64_t question, int awaited) {
  const int r = group_rank(peer);
  if (question != question_ || r < 0 || answers_[static_cast<std::size_t>(r)] != silent) return;
  answers_[static_cast<std::size_t>(r)] = awaited < 0 ? awaited : group_rank(awaited);
  --num_silent_;
}

void BlameChain::ask(const Operation& op, Nanoseconds now) {
  asked_about_ = op.sequence;
  asked_at_ = now;
  ++question_;
  answers_.assign(static_cast<std::size_t>(ranks_.size()), silent);
  answers_[static_cast<std::size_t>(ranks_.rank)] = unknown;
  num_silent_ = ranks_.size() - 1;
  for (int r = 0; r < ranks_.size(); ++r)
    if (r != ranks_.rank) ranks_.transport->ask(ranks_.world_rank(r), ranks_.space, question_);
}

Failure BlameChain::judge(const Group& group, const Operation& op, Nanoseconds now) {
  const Nanoseconds lead = std::min(patience, std::max<Nanoseconds>(0, (op.deadline - op.started) / 4));
  if (now < op.deadline - lead) return {};
  if (asked_at_ == 0 || asked_about_ != op.sequence) ask(op, now);
  if (now < op.deadline) return {};
  if (num_silent_ > 0) return now - asked_at_ < patience ? Failure{} : verdict(group, op, now);
  if (asked_at_ >= op.deadline) return verdict(group, op, now);
  ask(op, now);  // answers from before the deadline may be out of date
  return {};
}

// The rank at which the chain of waiting ranks ends, or -1 if it ends nowhere.
int BlameChain::end_of_chain(int first) const {
  std::vector<bool> is_known(answers_.size());
  for (int r = first; r >= 0 && r != ranks_.rank && !is_known[static_cast<std::size_t>(r)];) {
    is_known[static_cast<std::size_t>(r)] = true;
    const int next = answers_[static_cast<std::size_t>(r)];
    if (next == silent || next == nobody) return r;
    r = next;
  }
  return -1;
}

Failure BlameChain::verdict(const Group& group, const Operation& op, Nanoseconds now) const {
  const int first = find_awaited();
  int culprit = end_of_chain(first);
  for (const int kind : {silent, static_cast<int>(nobody)})
    if (const auto found = std::ranges::find(answers_, kind); culprit < 0 && found != answers_.end())
      culprit = static_cast<int>(found - answers_.begin());
  const bool is_unclear = culprit < 0;
  if (is_unclear) culprit = first < 0 ? -1 : first;

  const auto name = [&](int r) { return r < 0 ? std::string("the peers") : group.name(r); };
  std::string why = group.describe(op) + ": nothing from " + name(first) + " for " + waited_text(op, now);
  if (culprit != first && culprit >= 0) why += ", which waits for " + name(culprit);
  const std::string it = culprit != first && culprit >= 0 ? "; " + name(culprit) : "; it";
  if (is_unclear) {
    why += "; all processes answer, and none is done: are the links slow?";
  } else if (answers_[static_cast<std::size_t>(culprit)] == silent) {
    why += it + " does not answer: is its process stopped, or its link down?";
  } else {
    why += it + " answers, but is in no operation: has it called this one?";
  }
  return {FailureKind::timeout, culprit, why};
}

}  // namespace paceline
