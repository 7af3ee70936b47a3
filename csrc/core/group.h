// P ranks of one host that exchange bytes through shared memory.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/outbox.h"
#include "core/peer.h"
#include "core/pipes.h"
#include "core/session.h"

namespace paceline {

// Where a rank's outbox is; exchanged through whatever the caller bootstraps with.
struct Address {
  std::int32_t pid = 0;
  std::int32_t control_fd = 0;
  Location outbox;
};

class Group final : public Session {
 public:
  Group(Engine& engine, int rank, int size);
  ~Group() override;

  Address address() const;
  // Opens everybody's outbox; `addresses[r]` is that of rank r. Throws Failed(config) if one cannot be opened.
  void connect(const std::vector<Address>& addresses);

  void check(Nanoseconds now) override;
  // Tells the peers that this rank will not answer any more.
  void leave();
  bool can_free() const;  // nobody looks at the outbox any more

  // All ranks are processes: a caller that spins does not keep another rank from coming.
  bool is_alone() const { return is_alone_; }
  struct Quick {
    bool is_done = false;
    std::uint64_t announced = 0;  // else the sequence number that peers see it under, or 0: not begun
  };
  // A small all_reduce if nothing is queued and the peers come within `looks`; else begun at most.
  Quick all_reduce_at_once(const SmallReduce& call, int looks);

  // For the operations.
  const Outbox& own() const { return own_; }
  const Outbox& outbox(int r) const { return outboxes_[static_cast<std::size_t>(r)]; }
  Peer& peer(int r) { return *peers_[static_cast<std::size_t>(r)]; }
  // A counter of ours has a new value for peers to see.
  void publish(Outbox::Counter& counter, std::uint64_t value);
  Post& prepare_post(Operation& op, std::uint32_t mode);
  bool can_post(std::uint64_t sequence);
  // Whether `r` has announced operation `op`; throws Failed(mismatch) if it called something else.
  bool has_posted(Operation& op, int r);
  bool is_done(int r, std::uint64_t sequence);
  bool is_stage_free(Operation& op);
  std::uint64_t last_staged = 0;  // the last operation that used the stages

 private:
  Task start(Operation& op) override;
  void succeeded(const Operation& op) override;
  void failed(const Failure& failure) override;
  bool has_messages() const override { return pipes_.has_pending(); }
  void enqueue_message(const OperationPointer& op) override { pipes_.enqueue(op); }
  bool progress_messages() override { return pipes_.progress(); }
  void fail_messages(const Failure& failure) override { pipes_.fail_all(failure); }

  std::byte* memory_ = nullptr;
  Outbox own_;
  std::vector<Outbox> outboxes_;
  std::vector<std::shared_ptr<Peer>> peers_;
  std::vector<std::uint64_t> known_done_;
  Pipes pipes_;
  bool has_left_ = false;
  bool is_alone_ = false;
  bool is_connected_ = false;

  friend class Pipes;
};

// The operations: resumable, one per family. `op` outlives the task.
Task combine(Group& group, Operation& op);   // all_reduce, reduce, reduce_scatter
Task exchange(Group& group, Operation& op);  // broadcast, gathers, scatter, all_to_all, barrier

}  // namespace paceline
