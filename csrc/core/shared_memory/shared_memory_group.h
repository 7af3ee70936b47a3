// P ranks of one host that exchange bytes through shared memory.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/shared_memory/outbox.h"
#include "core/shared_memory/peer.h"
#include "core/shared_memory/pipes.h"
#include "core/engine/group.h"

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
  // A small all_reduce if nothing is queued and the peers come within `looks` and `yields`; else begun at most.
  Quick all_reduce_at_once(const SmallReduce& call, int looks, int yields);

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
  // Where an operation's data is in a ring. Reductions: the same on all ranks, because all make the same calls.
  struct Place {
    std::uint64_t at = 0;   // bytes from its start
    std::uint64_t lap = 0;  // how often the ring was begun anew before
  };
  // Whether everybody has finished the reductions that used whole stages, and, for stages, small ones too.
  bool is_ring_free(Operation& op, bool is_whole);
  Place take_ring_stages(const Operation& op, std::uint64_t slices);
  // Puts the data of a small reduction where the peers find it by the post.
  void fill(Post& post, std::uint64_t sequence, const std::byte* data, std::size_t num_bytes);
  const std::byte* filled(int r, std::uint64_t sequence) const {
    const Location& place = own_.post(sequence).source;
    return place.offset == 0 ? outbox(r).post(sequence).payload : lane(r, place.generation).ring(place.offset - 1);
  }
  // Where slice `k` of a reduction that begins at `first` is in each rank's ring.
  static Place ring_place(const Place& first, std::uint64_t k) {
    const std::uint64_t end = first.at + k * Outbox::stage_bytes;
    return {end % Outbox::ring_bytes, first.lap + end / Outbox::ring_bytes};
  }

  // The stage of an exchange that the next one which takes some begins with; to be told in its post.
  std::uint32_t first_stage() const { return first_stage_; }
  bool is_stage_free(Operation& op);
  void take_stages(const Operation& op, std::uint64_t slices);
  // The stage in which rank `r` keeps slice `k` of the exchange.
  std::byte* stage(const Operation& op, int r, std::uint64_t k) const {
    return outbox(r).stage((outbox(r).post(op.sequence).mode >> 16) + k);
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
  bool is_known_who_runs(Nanoseconds now);

  std::byte* memory_ = nullptr;
  Outbox own_;
  std::vector<Outbox> outboxes_;
  std::vector<std::shared_ptr<Peer>> peers_;
  std::vector<std::uint64_t> known_done_;
  struct Pulse {
    std::uint32_t beat = 0;
    Nanoseconds since = 0;  // when it was first seen, as of the last find_frozen()
  };
  std::vector<Pulse> pulses_;
  struct Late {
    std::uint64_t sequence = 0;  // of the operation whose deadline has passed
    Nanoseconds since = 0;  // when that was noticed
  } late_;
  Pipes pipes_;
  // Whose ring rank `r` puts small reductions in: of two ranks, the one that it read in the lap before, because those
  // lines are in its cache and nobody else's.
  const Outbox& lane(int r, std::uint64_t lap) const {
    return size_ == 2 ? outbox((r + static_cast<int>(lap & 1)) & 1) : outbox(r);
  }

  std::uint64_t last_staged_ = 0;  // the last reduction that used whole stages
  std::uint64_t last_filled_ = 0;  // the last small one in the ring; those before the last few are over
  Place ring_;                     // where the next one begins
  std::uint64_t last_sent_ = 0;    // the last exchange that used stages
  std::uint32_t first_stage_ = 0;
  bool has_left_ = false;
  bool is_alone_ = false;
  bool is_connected_ = false;

  friend class Pipes;
};

// The operations: resumable, one per family. `op` outlives the task.
Task combine(Group& group, Operation& op);   // all_reduce, reduce, reduce_scatter
Task exchange(Group& group, Operation& op);  // broadcast, gathers, scatter, all_to_all, barrier

}  // namespace paceline
