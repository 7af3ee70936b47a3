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
  // Whether everybody has finished the operations that used stages of the ring, and, for stages, small ones too.
  bool is_ring_free(Operation& op, bool is_whole);
  // The stage that the next operation which takes some begins with; to be told in its post.
  std::uint32_t first_stage() const { return static_cast<std::uint32_t>(ring_at_ / Outbox::stage_bytes); }
  void take_stages(const Operation& op, std::uint64_t slices);
  // The stage in which rank `r` keeps slice `k` of the operation.
  std::byte* stage(const Operation& op, int r, std::uint64_t k) const {
    return outbox(r).stage((outbox(r).post(op.sequence).mode >> 16) + k);
  }
  // Puts the data of a small reduction where the peers find it by the post.
  void fill(Post& post, std::uint64_t sequence, const std::byte* data, std::size_t num_bytes);
  const std::byte* filled(int r, std::uint64_t sequence) const {
    const Post& post = outbox(r).post(sequence);
    return post.source.offset == 0 ? post.payload : outbox(r).ring(post.source.offset - 1);
  }

 private:
  Task start(Operation& op) override;
  void succeeded(const Operation& op) override;
  void failed(const Failure& failure) override;
  bool has_messages() const override { return pipes_.has_pending(); }
  void enqueue_message(const OperationPointer& op) override { pipes_.enqueue(op); }
  bool progress_messages() override { return pipes_.progress(); }
  void fail_messages(const Failure& failure) override { pipes_.fail_all(failure); }

  // A peer whose process stands still, or -1.
  int find_frozen(Nanoseconds now);

  std::byte* memory_ = nullptr;
  Outbox own_;
  std::vector<Outbox> outboxes_;
  std::vector<std::shared_ptr<Peer>> peers_;
  std::vector<std::uint64_t> known_done_;
  struct Pulse {
    std::uint32_t beat = 0;
    Nanoseconds since = 0;  // when it was first seen
  };
  std::vector<Pulse> pulses_;
  Pipes pipes_;
  std::uint64_t last_staged_ = 0;  // the last operation that used whole stages
  std::uint64_t last_filled_ = 0;  // the last small one in the ring; those before the last few are over
  std::uint64_t ring_at_ = 0;      // where the next one begins
  bool has_left_ = false;
  bool is_alone_ = false;
  bool is_connected_ = false;

  friend class Pipes;
};

// The operations: resumable, one per family. `op` outlives the task.
Task combine(Group& group, Operation& op);   // all_reduce, reduce, reduce_scatter
Task exchange(Group& group, Operation& op);  // broadcast, gathers, scatter, all_to_all, barrier

}  // namespace paceline
