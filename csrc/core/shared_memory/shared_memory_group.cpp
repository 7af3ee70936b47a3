#include "core/shared_memory/shared_memory_group.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "core/engine/engine.h"
#include "core/base/reduce.h"

namespace paceline {
namespace {

constexpr Nanoseconds frozen_after = 400'000'000;  // several times as long as a helper sleeps

}  // namespace

SharedMemoryGroup::SharedMemoryGroup(Engine& engine, HostMemory& memory, int rank, int size)
    : Group(engine, rank, size), memory_(memory), pipes_(*this) {
  block_ = static_cast<std::byte*>(memory_.arena().allocate(Outbox::num_bytes(size)));
  own_ = Outbox(block_, size);
}

SharedMemoryGroup::~SharedMemoryGroup() { memory_.free(block_); }

OutboxAddress SharedMemoryGroup::address() const {
  const Arena& arena = memory_.arena();
  return {static_cast<std::int32_t>(getpid()), arena.control_fd(), arena.locate(block_, 1)};
}

void SharedMemoryGroup::connect(const std::vector<OutboxAddress>& addresses) {
  for (int r = 0; r < size_; ++r) {
    const OutboxAddress& a = addresses[static_cast<std::size_t>(r)];
    peers_.push_back(memory_.peer(a.pid, a.control_fd));
    outboxes_.emplace_back(r == rank_ ? block_ : peers_.back()->resolve(a.outbox, Outbox::num_bytes(size_)),
                           size_);
  }
  ranks_are_processes_ = true;
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && peer(r).pid() == getpid()) ranks_are_processes_ = false;
  pulses_.assign(static_cast<std::size_t>(size_), {});
  known_done_.assign(static_cast<std::size_t>(size_), 0);
  pipes_.resize(size_);
  is_connected_ = true;
  engine_.start();
}

Task SharedMemoryGroup::start(Operation& op) {
  return is_reduction(op.request.kind) ? combine(*this, op) : exchange(*this, op);
}

void SharedMemoryGroup::succeeded(const Operation& op) { publish(own_.done(), op.sequence); }

void SharedMemoryGroup::failed(const Failure& failure) {
  if (is_connected_) publish(own_.poison(), Poison::packed(failure));
}

void SharedMemoryGroup::leave() {
  if (has_left_) return;
  has_left_ = true;
  fail({FailureKind::aborted, rank_, "rank " + std::to_string(rank_) + ": the communicator was closed"});
  for (int r = 0; r < size_ && is_connected_; ++r) {
    outbox(r).left(rank_).store(1);
    peer(r).ring();
  }
}

bool SharedMemoryGroup::can_free() const {
  for (int r = 0; r < size_ && is_connected_; ++r)
    if (r != rank_ && own_.left(r).load() == 0 && peers_[static_cast<std::size_t>(r)]->is_alive())
      return false;
  return true;
}

void SharedMemoryGroup::check(Nanoseconds now) {
  if (!has_pending()) return;
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    const Poison poison = Poison::unpacked(outbox(r).poison().load());
    const auto kind = static_cast<FailureKind>(poison.kind);
    const bool is_here = own_.left(r).load() == 0 && peer(r).is_alive();
    if (kind != FailureKind::none && kind != FailureKind::aborted)
      return fail(peer_gave_up(r, kind, static_cast<int>(poison.culprit_plus_one) - 1));
    if (is_here || queue_.empty()) continue;
    const Operation& op = *queue_.front();
    if (outbox(r).done().load() >= op.sequence) continue;  // it finished its part before it left
    if (progress()) return;                                // perhaps all that was needed had arrived already
    const bool closed = own_.left(r).load() != 0;
    const std::string how = closed ? " closed its communicator"
                                   : " is gone: process " + std::to_string(peer(r).pid()) + " has ended";
    return fail({FailureKind::peer_lost, r,
                 describe(op) + ": " + name(r) + how + " before it finished this operation"});
  }
  const int frozen = find_frozen(now);
  if (frozen >= 0 && !queue_.empty()) queue_.front()->waiting_for = frozen;
  const Failure late = lateness(now);
  if (late && (frozen >= 0 || is_known_who_runs(now))) return fail(late);
  pipes_.check(now);
}

// Whether every peer was seen running after the deadline of the running operation, or had time enough to be
// seen. On a busy machine this rank may not have looked for a long time, and would blame the rank that it
// waits for instead of the one that is stopped.
bool SharedMemoryGroup::is_known_who_runs(Nanoseconds now) {
  if (const std::uint64_t sequence = queue_.front()->sequence; late_.sequence != sequence)
    late_ = {sequence, now};
  bool all_run = true;
  for (int r = 0; r < size_; ++r)
    all_run &= r == rank_ || pulses_[static_cast<std::size_t>(r)].since > late_.since;
  return all_run || now - late_.since > frozen_after;
}

// The rank that this one waits for may itself wait for a rank that is stopped: only processes that run have a
// beat.
int SharedMemoryGroup::find_frozen(Nanoseconds now) {
  int frozen = -1;
  Nanoseconds longest = frozen_after;
  for (int r = 0; r < size_; ++r) {
    Pulse& pulse = pulses_[static_cast<std::size_t>(r)];
    const std::uint32_t beat = peer(r).beat();
    if (beat != pulse.beat || pulse.since == 0) pulse = {beat, now};
    if (r != rank_ && now - pulse.since > longest) {
      longest = now - pulse.since;
      frozen = r;
    }
  }
  return frozen;
}

void SharedMemoryGroup::publish(Outbox::Counter& counter, std::uint64_t value) {
  counter.store(value);  // sequentially consistent, as ring() needs
  for (int r = 0; r < size_; ++r)
    if (r != rank_) peer(r).ring();
}

bool SharedMemoryGroup::is_done(int r, std::uint64_t sequence) {
  std::uint64_t& known = known_done_[static_cast<std::size_t>(r)];
  if (known < sequence) known = outbox(r).done().load();
  return known >= sequence;
}

bool SharedMemoryGroup::can_post(std::uint64_t sequence) {
  if (sequence <= Outbox::num_posts) return true;
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && !is_done(r, sequence - Outbox::num_posts)) {
      queue_.front()->waiting_for = r;
      return false;
    }
  return true;
}

bool SharedMemoryGroup::is_ring_free(Operation& op, bool needs_stages) {
  const std::uint64_t last = needs_stages ? std::max(last_staged_, last_filled_) : last_staged_;
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && !is_done(r, last)) {
      op.waiting_for = r;
      return false;
    }
  return true;
}

SharedMemoryGroup::RingPlace SharedMemoryGroup::take_ring_stages(const Operation& op, std::uint64_t slices) {
  const RingPlace first{(ring_.at + Outbox::stage_bytes - 1) / Outbox::stage_bytes * Outbox::stage_bytes,
                        ring_.lap};
  ring_ = ring_place(first, slices);
  last_staged_ = op.sequence;
  return first;
}

void SharedMemoryGroup::fill(OutboxPost& post, std::uint64_t sequence, const std::byte* data,
                             std::size_t num_bytes) {
  post.source.offset = 0;
  std::byte* room = post.payload;
  if (num_bytes > Outbox::inline_bytes) {
    if (ring_.at + num_bytes > Outbox::ring_bytes) ring_ = {0, ring_.lap + 1};
    room = ring_of(rank_, ring_.lap).ring(ring_.at);
    post.source.offset = ring_.at + 1;
    post.source.generation = static_cast<std::uint32_t>(ring_.lap);
    ring_.at += (num_bytes + 63) / 64 * 64;
    last_filled_ = sequence;
  }
  if (num_bytes > 0) std::memcpy(room, data, num_bytes);
}

bool SharedMemoryGroup::is_stage_free(Operation& op) {
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && !is_done(r, last_sent_)) {
      op.waiting_for = r;
      return false;
    }
  return true;
}

void SharedMemoryGroup::take_stages(const Operation& op, std::uint64_t slices) {
  last_sent_ = op.sequence;
  first_stage_ = static_cast<std::uint32_t>((first_stage_ + slices) % Outbox::num_stages);
}

Group::AtOnce SharedMemoryGroup::all_reduce_at_once(const SmallReduce& call, int looks, int yields) {
  constexpr int max_ranks = 16;
  const std::size_t num_bytes = call.numel * size_of(call.dtype);
  const std::uint64_t sequence = next_sequence_;
  if (!queue_.empty() || failure_ || size_ < 2 || size_ > max_ranks || num_bytes == 0 ||
      num_bytes > Outbox::eager_reduce_bytes(size_))
    return {};
  const std::uint64_t last = sequence > Outbox::num_posts ? sequence - Outbox::num_posts : 0;
  const std::uint64_t before = std::max(last, last_staged_);
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && !is_done(r, before)) return {};
  ++next_sequence_;
  OutboxPost& post = own_.post(sequence);
  post.call = PackedCall::of(OperationKind::all_reduce, call.dtype, call.op, 0);
  post.routing = Routing{};
  post.numel = call.numel;
  fill(post, sequence, call.data, num_bytes);
  publish(post.sequence, sequence);
  const void* sources[max_ranks];
  for (int r = 0; r < size_; ++r) {
    const OutboxPost& theirs = outbox(r).post(sequence);
    while (theirs.sequence.load() != sequence) {
      if (looks-- > 0) cpu_pause();
      else if (yields-- > 0) sched_yield();
      else return {false, sequence};
    }
    if (!(theirs.call == post.call) || theirs.numel != post.numel) return {false, sequence};
    sources[r] = r == rank_ ? call.data : filled(r, sequence);
    std::uint64_t& known = known_done_[static_cast<std::size_t>(r)];
    known = std::max(known, sequence - 1);
  }
  void* destination = call.data;
  reduce(call.dtype, call.op, &destination, 1, sources, size_, call.numel, size_);
  publish(own_.done(), sequence);
  __builtin_prefetch(&own_.post(next_sequence_), 1);  // peers have read it: fetching it back takes time
  return {true, sequence};
}

OutboxPost& SharedMemoryGroup::prepare_post(Operation& op) {
  OutboxPost& post = own_.post(op.sequence);
  post.call = PackedCall::of(op.request);
  post.routing = Routing{};
  post.numel = op.request.numel;
  return post;
}

bool SharedMemoryGroup::has_posted(Operation& op, int r) {
  const OutboxPost& post = outbox(r).post(op.sequence);
  if (post.sequence.load() != op.sequence) {
    op.waiting_for = r;
    return false;
  }
  std::uint64_t& known = known_done_[static_cast<std::size_t>(r)];
  if (known + 1 < op.sequence) known = op.sequence - 1;
  if (post.call == PackedCall::of(op.request) && post.numel == op.request.numel) return true;
  throw Failed(mismatch(CollectiveCall::of(op.request), post.call.unpacked(post.numel), r, name(r)));
}

}  // namespace paceline
