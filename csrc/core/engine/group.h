// What groups over shared memory and over the network have in common: collectives in the order of their calls, one
// at a time, messages beside them, and one failure that ends everything. The engine holds its lock around every
// member function.
#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "core/engine/operation.h"

namespace paceline {

class Engine;

class Session {
 public:
  Session(Engine& engine, int rank, int size) : engine_(engine), rank_(rank), size_(size) {}
  virtual ~Session() = default;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }
  Engine& engine() const { return engine_; }
  bool has_pending() const { return !queue_.empty() || has_messages(); }
  const Operation* running() const { return queue_.empty() ? nullptr : queue_.front().get(); }
  // Whether the running operation has so much to move that the caller should not be kept.
  bool is_heavy() const { return !queue_.empty() && queue_.front()->is_heavy; }
  const Failure& failure() const { return failure_; }
  std::string describe(const Operation& op) const;
  // The rank whose move the running operation misses, or that made this group fail; Respondent's special values if
  // there is none or none known.
  int waits_for() const;

  void enqueue(const OperationPointer& op);
  // Moves what can be moved; true if anything did.
  bool progress();
  // The slow checks: peers' poison and death, deadlines. To be called when nothing moves.
  virtual void check(Nanoseconds now) = 0;
  void fail(const Failure& failure);
  void expire_running() {
    if (!queue_.empty()) queue_.front()->deadline = 0;
  }

  // The failure with its culprit as users number the ranks.
  Failure failure_to_tell() const {
    Failure told = failure_;
    told.rank = told_rank(told.rank);
    return told;
  }
  std::string name(int r) const { return "rank " + std::to_string(told_rank(r)); }
  int told_rank(int r) const {
    if (r < 0 || known_as.empty()) return r;
    return r < size_ ? known_as[static_cast<std::size_t>(r)] : r - size_;
  }

  // How users number the ranks, if this group is part of a larger one; culprits from outside are size + that number.
  std::vector<int> known_as;
  bool did_move = false;  // set by conditions that do work while they are polled

 protected:
  virtual Task start(Operation& op) = 0;
  virtual void succeeded(const Operation&) {}
  virtual void failed(const Failure&) {}
  virtual bool has_messages() const = 0;
  virtual void enqueue_message(const OperationPointer& op) = 0;
  virtual bool progress_messages() = 0;
  virtual void fail_messages(const Failure& failure) = 0;
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

}  // namespace paceline
