// P ranks of one host that exchange bytes through shared memory. Collectives run in the order of their calls, one
// at a time; point-to-point messages run beside them. The engine holds its lock around every member function.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "core/operation.h"
#include "core/outbox.h"
#include "core/peer.h"
#include "core/pipes.h"

namespace paceline {

class Engine;

// Where a rank's outbox is; exchanged through whatever the caller bootstraps with.
struct Address {
  std::int32_t pid = 0;
  std::int32_t control_fd = 0;
  Location outbox;
};

class Group {
 public:
  Group(Engine& engine, int rank, int size);
  ~Group();

  Address address() const;
  // Opens everybody's outbox; `addresses[r]` is that of rank r. Throws Failed(config) if one cannot be opened.
  void connect(const std::vector<Address>& addresses);

  int rank() const { return rank_; }
  int size() const { return size_; }
  bool has_pending() const { return !queue_.empty() || pipes_.has_pending(); }
  // Whether the running operation has so much to move that the caller should not be kept.
  bool is_heavy() const { return !queue_.empty() && queue_.front()->is_heavy; }
  const Failure& failure() const { return failure_; }
  std::string describe(const Operation& op) const;

  void enqueue(const OperationPointer& op);
  // Moves what can be moved; true if anything did.
  bool progress();
  // The slow checks: peers' poison and death, deadlines. To be called when nothing moves.
  void check(Nanoseconds now);
  void fail(const Failure& failure);
  void expire_running() {
    if (!queue_.empty()) queue_.front()->deadline = 0;
  }
  // Tells the peers that this rank will not answer any more.
  void leave();
  bool can_free() const;  // nobody looks at the outbox any more

  // For the operations.
  const Outbox& own() const { return own_; }
  const Outbox& outbox(int r) const { return outboxes_[static_cast<std::size_t>(r)]; }
  Peer& peer(int r) { return *peers_[static_cast<std::size_t>(r)]; }
  Engine& engine() { return engine_; }
  // A counter of ours has a new value for peers to see.
  void publish(Outbox::Counter& counter, std::uint64_t value);
  Post& prepare_post(Operation& op, std::uint32_t mode);
  bool can_post(std::uint64_t sequence);
  // Whether `r` has announced operation `op`; throws Failed(mismatch) if it called something else.
  bool has_posted(Operation& op, int r);
  bool is_done(int r, std::uint64_t sequence);
  bool is_stage_free(Operation& op);
  std::uint64_t last_staged = 0;  // the last operation that used the stages
  bool did_move = false;          // set by conditions that do work while they are polled

 private:
  void start(Operation& op);
  void finish(const OperationPointer& op, Failure failure);

  Engine& engine_;
  int rank_;
  int size_;
  std::byte* memory_ = nullptr;
  Outbox own_;
  std::vector<Outbox> outboxes_;
  std::vector<std::shared_ptr<Peer>> peers_;
  std::vector<std::uint64_t> known_done_;
  std::deque<OperationPointer> queue_;
  Pipes pipes_;
  std::uint64_t next_sequence_ = 1;
  Failure failure_;
  bool has_left_ = false;
  bool is_connected_ = false;

  friend class Pipes;
};

// The operations: resumable, one per family. `op` outlives the task.
Task combine(Group& group, Operation& op);   // all_reduce, reduce, reduce_scatter
Task exchange(Group& group, Operation& op);  // broadcast, gathers, scatter, all_to_all, barrier

}  // namespace paceline
