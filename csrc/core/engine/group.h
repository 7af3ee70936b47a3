// What groups over shared memory, over the network and over both have in common: collectives in the order of
// their calls, one at a time; messages beside them; and one failure that ends everything. The engine holds
// its lock around every member function.
#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "core/engine/operation.h"

namespace paceline {

class Engine;

class Group {
 public:
  Group(Engine& engine, int rank, int size) : engine_(engine), rank_(rank), size_(size) {}
  virtual ~Group() = default;
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  Engine& engine() const { return engine_; }
  bool has_pending() const { return !queue_.empty() || has_messages(); }
  const Operation* running() const { return queue_.empty() ? nullptr : queue_.front().get(); }
  const Failure& failure() const { return failure_; }
  std::string describe(const Operation& op) const;
  // The rank that the running operation waits for, or that made this group fail; a special value of
  // Respondent if there is none or none known.
  int awaited_rank() const;

  void enqueue(const OperationPointer& op);
  // Moves what can be moved; true if anything did.
  bool progress();
  // The slow checks: peers' failures and deaths, deadlines. To be called when nothing moves.
  virtual void check(Nanoseconds now) = 0;
  void fail(const Failure& failure);
  void expire_running() {
    if (!queue_.empty()) queue_.front()->deadline = 0;
  }

  struct AtOnce {
    bool is_done = false;
    std::uint64_t announced = 0;  // if not done: the sequence number that peers see it under; 0: not begun
  };
  // Runs a small all_reduce in the caller's thread if nothing is queued and the peers come within `looks`
  // looks and `yields` yields. Otherwise it has at most announced the call. A group may always decline.
  virtual AtOnce all_reduce_at_once(const SmallReduce&, int /*looks*/, int /*yields*/) { return {}; }

  // Closing, in two steps. Tells peers that this rank will not answer any more.
  virtual void leave() {}
  // Whether no peer reads this group's memory any more, so that it may be destroyed.
  virtual bool can_free() const { return true; }

  // Users' numbers of the ranks if this group is part of a larger one: user_ranks[r] is that of rank r. The
  // failed rank of a Failure may be outside of this group; it is then size() + its number.
  std::vector<int> user_ranks;
  int user_rank(int r) const {
    if (r < 0 || user_ranks.empty()) return r;
    return r < size_ ? user_ranks[static_cast<std::size_t>(r)] : r - size_;
  }
  std::string name(int r) const { return "rank " + std::to_string(user_rank(r)); }
  // The failure with its culprit in users' numbering.
  Failure user_failure() const {
    Failure failure = failure_;
    failure.rank = user_rank(failure.rank);
    return failure;
  }

  bool did_move = false;  // set by a condition that makes progress while it is polled

 protected:
  virtual Task start(Operation& op) = 0;
  virtual void succeeded(const Operation&) {}
  virtual void failed(const Failure&) {}
  virtual bool has_messages() const = 0;
  virtual void enqueue_message(const OperationPointer& op) = 0;
  virtual bool progress_messages() = 0;
  virtual void fail_messages(const Failure& failure) = 0;
  // The failure of this rank after member `r` gave up with a failure of `kind`, caused by `culprit`.
  Failure peer_gave_up(int r, FailureKind kind, int culprit) const;
  // The running operation as a timeout if its deadline has passed.
  Failure lateness(Nanoseconds now) const;

  Engine& engine_;
  int rank_;
  int size_;
  std::deque<OperationPointer> queue_;
  Failure failure_;
  std::uint64_t next_sequence_ = 1;

 private:
  void finish(const OperationPointer& op, Failure failure);
};

// "1.234 s", since `op` started.
std::string waited_text(const Operation& op, Nanoseconds now);

}  // namespace paceline
