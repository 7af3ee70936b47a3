// P ranks of one host that exchange bytes through shared memory.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/engine/group.h"
#include "core/shared_memory/host_memory.h"
#include "core/shared_memory/outbox.h"
#include "core/shared_memory/pipes.h"

namespace paceline {

// Where a rank's outbox is. The caller exchanges the addresses of all ranks before they connect.
struct OutboxAddress {
  std::int32_t pid = 0;
  std::int32_t control_fd = 0;
  Location outbox;
};

class SharedMemoryGroup final : public Group {
 public:
  SharedMemoryGroup(Engine& engine, HostMemory& memory, int rank, int size);
  ~SharedMemoryGroup() override;

  OutboxAddress address() const;
  // Opens the outboxes of all ranks; `addresses[r]` is that of rank r. To be called as the driver. Throws
  // Failed(config) if one cannot be opened.
  void connect(const std::vector<OutboxAddress>& addresses);

  void check(Nanoseconds now) override;
  void leave() override;
  bool can_free() const override;

  // Whether every rank is a process of its own, so that a caller which spins with Python's lock held does not
  // keep another rank from making its call.
  bool ranks_are_processes() const { return ranks_are_processes_; }
  AtOnce all_reduce_at_once(const SmallReduce& call, int looks, int yields) override;

  // For the operations.
  HostMemory& memory() { return memory_; }
  const Outbox& own() const { return own_; }
  const Outbox& outbox(int r) const { return outboxes_[static_cast<std::size_t>(r)]; }
  HostPeer& peer(int r) { return *peers_[static_cast<std::size_t>(r)]; }
  // Sets one of this rank's counters and wakes the peers.
  void publish(Outbox::Counter& counter, std::uint64_t value);
  // Fills in the post of `op`, except for where its data is.
  OutboxPost& prepare_post(Operation& op);
  // Whether the slot of post `sequence` is free: all peers have finished the operation that used it before.
  bool can_post(std::uint64_t sequence);
  // Whether `r` has announced operation `op`; throws Failed(mismatch) if it made another call.
  bool has_posted(Operation& op, int r);
  bool is_done(int r, std::uint64_t sequence);
  // Where an operation's data is in a ring. The same on all ranks, because all make the same calls.
  struct RingPlace {
    std::uint64_t at = 0;   // bytes from the start of the ring
    std::uint64_t lap = 0;  // number of times that the ring has wrapped
  };
  // Whether all ranks have finished the reductions that used whole stages; if the next one needs whole stages
  // itself, the small ones in the ring as well.
  bool is_ring_free(Operation& op, bool needs_stages);
  RingPlace take_ring_stages(const Operation& op, std::uint64_t slices);
  // Puts the data of a small reduction where the peers find it through the post.
  void fill(OutboxPost& post, std::uint64_t sequence, const std::byte* data, std::size_t num_bytes);
  // Where rank `r` has put its data of a small reduction.
  const std::byte* filled(int r, std::uint64_t sequence) const {
    const Location& place = own_.post(sequence).source;
    return place.offset == 0 ? outbox(r).post(sequence).payload
                             : ring_of(r, place.generation).ring(place.offset - 1);
  }
  // Where slice `k` of a reduction that begins at `first` is in each rank's ring.
  static RingPlace ring_place(const RingPlace& first, std::uint64_t k) {
    const std::uint64_t end = first.at + k * Outbox::stage_bytes;
    return {end % Outbox::ring_bytes, first.lap + end / Outbox::ring_bytes};
  }

  // The stage that holds slice 0 of the next exchange; to be announced in its post.
  std::uint32_t first_stage() const { return first_stage_; }
  bool is_stage_free(Operation& op);
  void take_stages(const Operation& op, std::uint64_t slices);
  // The stage in which rank `r` keeps slice `k` of the exchange.
  std::byte* stage(const Operation& op, int r, std::uint64_t k) const {
    return outbox(r).stage(outbox(r).post(op.sequence).routing.first_stage + k);
  }

 private:
  Task start(Operation& op) override;
  void succeeded(const Operation& op) override;
  void failed(const Failure& failure) override;
  bool has_messages() const override { return pipes_.has_pending(); }
  void enqueue_message(const OperationPointer& op) override { pipes_.enqueue(op); }
  bool progress_messages() override { return pipes_.progress(); }
  void fail_messages(const Failure& failure) override { pipes_.fail_all(failure); }

  // A peer whose process is stopped, or -1.
  int find_frozen(Nanoseconds now);
  bool is_known_who_runs(Nanoseconds now);

  HostMemory& memory_;
  std::byte* block_ = nullptr;  // of the own outbox
  Outbox own_;
  std::vector<Outbox> outboxes_;
  std::vector<std::shared_ptr<HostPeer>> peers_;
  std::vector<std::uint64_t> known_done_;
  struct Pulse {
    std::uint32_t beat = 0;
    Nanoseconds since = 0;  // when find_frozen() first saw this beat
  };
  std::vector<Pulse> pulses_;
  struct Late {
    std::uint64_t sequence = 0;  // of the operation whose deadline has passed
    Nanoseconds since = 0;       // when that was noticed
  } late_;
  Pipes pipes_;
  // The outbox in whose ring rank `r` puts small reductions. Two ranks exchange rings in every lap: each
  // writes where it has read in the lap before, because those lines are in its own cache only.
  const Outbox& ring_of(int r, std::uint64_t lap) const {
    return size_ == 2 ? outbox((r + static_cast<int>(lap & 1)) & 1) : outbox(r);
  }

  std::uint64_t last_staged_ = 0;  // the last reduction that used whole stages
  std::uint64_t last_filled_ = 0;  // the last small one in the ring; those before the last few are over
  RingPlace ring_;                 // where the next one begins
  std::uint64_t last_sent_ = 0;    // the last exchange that used stages
  std::uint32_t first_stage_ = 0;
  bool has_left_ = false;
  bool ranks_are_processes_ = false;
  bool is_connected_ = false;
};

// The operations: resumable, one per family. `op` outlives the task.
Task combine(SharedMemoryGroup& group, Operation& op);   // all_reduce, reduce, reduce_scatter
Task exchange(SharedMemoryGroup& group, Operation& op);  // broadcast, gathers, scatter, all_to_all, barrier

}  // namespace paceline
