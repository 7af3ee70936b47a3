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

// What all ranks must agree on besides the number of elements.
std::uint32_t signature(Kind kind, DType dtype, ReduceOp op, int root) {
  const bool reduces = kind == Kind::all_reduce || kind == Kind::reduce || kind == Kind::reduce_scatter;
  return static_cast<std::uint32_t>(kind) | static_cast<std::uint32_t>(dtype) << 4 |
         (reduces ? static_cast<std::uint32_t>(op) << 8 : 0u) | static_cast<std::uint32_t>(root) << 12;
}
std::uint32_t signature(const Request& r) { return signature(r.kind, r.dtype, r.op, r.root); }

std::string describe_call(std::uint32_t what, std::uint64_t numel) {
  std::string text = name_of(static_cast<Kind>(what & 15));
  text += "(" + std::to_string(numel) + " x " + name_of(static_cast<DType>((what >> 4) & 15));
  if ((what & 15) <= static_cast<std::uint32_t>(Kind::reduce_scatter))
    text += std::string(", ") + name_of(static_cast<ReduceOp>((what >> 8) & 15));
  return text + ", root " + std::to_string(what >> 12) + ")";
}

}  // namespace

Group::Group(Engine& engine, int rank, int size) : Session(engine, rank, size), pipes_(*this) {
  memory_ = static_cast<std::byte*>(engine.arena().allocate(Outbox::num_bytes(size)));
  own_ = Outbox(memory_, size);
}

Group::~Group() { engine_.arena().free(memory_); }

Address Group::address() const {
  return {static_cast<std::int32_t>(getpid()), engine_.arena().control_fd(), engine_.arena().locate(memory_, 1)};
}

void Group::connect(const std::vector<Address>& addresses) {
  for (int r = 0; r < size_; ++r) {
    const Address& a = addresses[static_cast<std::size_t>(r)];
    peers_.push_back(engine_.peer(a.pid, a.control_fd));
    outboxes_.emplace_back(r == rank_ ? memory_ : peers_.back()->resolve(a.outbox, Outbox::num_bytes(size_)), size_);
  }
  is_alone_ = true;
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && peer(r).pid() == getpid()) is_alone_ = false;
  pulses_.assign(static_cast<std::size_t>(size_), {});
  known_done_.assign(static_cast<std::size_t>(size_), 0);
  pipes_.resize(size_);
  is_connected_ = true;
}

Task Group::start(Operation& op) {
  return op.request.kind <= Kind::reduce_scatter ? combine(*this, op) : exchange(*this, op);
}

void Group::succeeded(const Operation& op) { publish(own_.done(), op.sequence); }

void Group::failed(const Failure& failure) {
  if (is_connected_)
    publish(own_.poison(), static_cast<std::uint64_t>(failure.kind) << 32 | static_cast<std::uint32_t>(failure.rank + 1));
}

void Group::leave() {
  if (has_left_) return;
  has_left_ = true;
  fail({FailureKind::aborted, rank_, "rank " + std::to_string(rank_) + ": the communicator was closed"});
  for (int r = 0; r < size_ && is_connected_; ++r) {
    outbox(r).left(rank_).store(1);
    peer(r).ring();
  }
}

bool Group::can_free() const {
  for (int r = 0; r < size_ && is_connected_; ++r)
    if (r != rank_ && own_.left(r).load() == 0 && peers_[static_cast<std::size_t>(r)]->is_alive()) return false;
  return true;
}

void Group::check(Nanoseconds now) {
  if (!has_pending()) return;
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    const std::uint64_t poison = outbox(r).poison().load();
    const auto kind = static_cast<FailureKind>(poison >> 32);
    const int culprit = static_cast<int>(static_cast<std::uint32_t>(poison)) - 1;
    const bool is_here = own_.left(r).load() == 0 && peer(r).is_alive();
    if (kind != FailureKind::none && kind != FailureKind::aborted) {
      std::string why = name(rank_) + ": " + name(r) + " gave up";
      if (kind == FailureKind::timeout) why += ": it waited too long for " + name(culprit);
      if (kind == FailureKind::peer_lost) why += " because it lost " + name(culprit);
      if (kind == FailureKind::mismatch) why += ": its call and that of " + name(culprit) + " did not match";
      return fail({kind, culprit, why});
    }
    if (is_here || queue_.empty()) continue;
    const Operation& op = *queue_.front();
    if (outbox(r).done().load() >= op.sequence) continue;  // it did its part before it went
    if (progress()) return;                                // perhaps all that was needed had come already
    const bool closed = own_.left(r).load() != 0;
    return fail({FailureKind::peer_lost, r,
                 describe(op) + ": " + name(r) + (closed ? " closed its communicator" : " is gone: process " +
                 std::to_string(peer(r).pid()) + " has ended") + " before it finished this operation"});
  }
  const int frozen = find_frozen(now);
  if (frozen >= 0 && !queue_.empty()) queue_.front()->waiting_for = frozen;
  const Failure late = lateness(now);
  if (late && (frozen >= 0 || is_known_who_runs(now))) return fail(late);
  pipes_.check(now);
}

// Whether every peer was seen running after the deadline of the running operation, or had the time to be. On a busy
// machine this rank may not have looked for long, and would blame whom it waits for instead of who is stopped.
bool Group::is_known_who_runs(Nanoseconds now) {
  if (const std::uint64_t sequence = queue_.front()->sequence; late_.sequence != sequence) late_ = {sequence, now};
  bool all_run = true;
  for (int r = 0; r < size_; ++r) all_run &= r == rank_ || pulses_[static_cast<std::size_t>(r)].since > late_.since;
  return all_run || now - late_.since > frozen_after;
}

// Whom we wait for may itself wait for somebody who is stopped: processes that run have a beat.
int Group::find_frozen(Nanoseconds now) {
  int frozen = -1;
  Nanoseconds longest = frozen_after;
  for (int r = 0; r < size_; ++r) {
    Pulse& pulse = pulses_[static_cast<std::size_t>(r)];
    const std::uint32_t beat = peer(r).beat();
    if (beat != pulse.beat || pulse.since == 0) pulse = {beat, now};
    if (r != rank_ && now - pulse.since > longest) longest = now - pulse.since, frozen = r;
  }
  return frozen;
}

void Group::publish(Outbox::Counter& counter, std::uint64_t value) {
  counter.store(value);  // sequentially consistent, as ring() needs
  for (int r = 0; r < size_; ++r)
    if (r != rank_) peer(r).ring();
}

bool Group::is_done(int r, std::uint64_t sequence) {
  std::uint64_t& known = known_done_[static_cast<std::size_t>(r)];
  if (known < sequence) known = outbox(r).done().load();
  return known >= sequence;
}

bool Group::can_post(std::uint64_t sequence) {
  if (sequence <= Outbox::num_posts) return true;
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && !is_done(r, sequence - Outbox::num_posts)) {
      queue_.front()->waiting_for = r;
      return false;
    }
  return true;
}

bool Group::is_ring_free(Operation& op, bool is_whole) {
  const std::uint64_t last = is_whole ? std::max(last_staged_, last_filled_) : last_staged_;
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && !is_done(r, last)) {
      op.waiting_for = r;
      return false;
    }
  return true;
}

Group::Place Group::take_ring_stages(const Operation& op, std::uint64_t slices) {
  const Place first{(ring_.at + Outbox::stage_bytes - 1) / Outbox::stage_bytes * Outbox::stage_bytes, ring_.lap};
  ring_ = ring_place(first, slices);
  last_staged_ = op.sequence;
  return first;
}

void Group::fill(Post& post, std::uint64_t sequence, const std::byte* data, std::size_t num_bytes) {
  post.source.offset = 0;
  std::byte* room = post.payload;
  if (num_bytes > Outbox::inline_bytes) {
    if (ring_.at + num_bytes > Outbox::ring_bytes) ring_ = {0, ring_.lap + 1};
    room = lane(rank_, ring_.lap).ring(ring_.at);
    post.source.offset = ring_.at + 1;
    post.source.generation = static_cast<std::uint32_t>(ring_.lap);
    ring_.at += (num_bytes + 63) / 64 * 64;
    last_filled_ = sequence;
  }
  if (num_bytes > 0) std::memcpy(room, data, num_bytes);
}

bool Group::is_stage_free(Operation& op) {
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && !is_done(r, last_sent_)) {
      op.waiting_for = r;
      return false;
    }
  return true;
}

void Group::take_stages(const Operation& op, std::uint64_t slices) {
  last_sent_ = op.sequence;
  first_stage_ = static_cast<std::uint32_t>((first_stage_ + slices) % Outbox::num_stages);
}

Group::Quick Group::all_reduce_at_once(const SmallReduce& call, int looks, int yields) {
  constexpr int most = 16;
  const std::size_t num_bytes = call.numel * size_of(call.dtype);
  const std::uint64_t sequence = next_sequence_;
  if (!queue_.empty() || failure_ || size_ < 2 || size_ > most || num_bytes == 0 ||
      num_bytes > Outbox::eager_reduce_bytes(size_))
    return {};
  const std::uint64_t last = sequence > Outbox::num_posts ? sequence - Outbox::num_posts : 0;
  const std::uint64_t before = std::max(last, last_staged_);
  for (int r = 0; r < size_; ++r)
    if (r != rank_ && !is_done(r, before)) return {};
  ++next_sequence_;
  Post& post = own_.post(sequence);
  post.what = signature(Kind::all_reduce, call.dtype, call.op, 0);
  post.mode = 0;
  post.numel = call.numel;
  fill(post, sequence, call.data, num_bytes);
  publish(post.sequence, sequence);
  const void* sources[most];
  for (int r = 0; r < size_; ++r) {
    const Post& theirs = outbox(r).post(sequence);
    while (theirs.sequence.load() != sequence) {
      if (looks-- > 0) cpu_pause();
      else if (yields-- > 0) sched_yield();
      else return {false, sequence};
    }
    if (theirs.what != post.what || theirs.numel != post.numel) return {false, sequence};
    sources[r] = r == rank_ ? call.data : filled(r, sequence);
    std::uint64_t& known = known_done_[static_cast<std::size_t>(r)];
    known = std::max(known, sequence - 1);
  }
  void* destination = call.data;
  reduce(call.dtype, call.op, &destination, 1, sources, size_, call.numel, size_);
  publish(own_.done(), sequence);
  __builtin_prefetch(&own_.post(next_sequence_), 1);  // peers have read it; fetching it back takes a while
  return {true, sequence};
}

Post& Group::prepare_post(Operation& op, std::uint32_t mode) {
  Post& post = own_.post(op.sequence);
  post.what = signature(op.request);
  post.mode = mode;
  post.numel = op.request.numel;
  return post;
}

bool Group::has_posted(Operation& op, int r) {
  const Post& post = outbox(r).post(op.sequence);
  if (post.sequence.load() != op.sequence) {
    op.waiting_for = r;
    return false;
  }
  std::uint64_t& known = known_done_[static_cast<std::size_t>(r)];
  if (known + 1 < op.sequence) known = op.sequence - 1;
  const std::uint32_t mine = signature(op.request);
  if (post.what != mine || post.numel != op.request.numel)
    throw Failed({FailureKind::mismatch, r,
                  "this rank called " + describe_call(mine, op.request.numel) + " but " + name(r) +
                      " called " + describe_call(post.what, post.numel) +
                      ": all ranks must make the same calls in the same order"});
  return true;
}

}  // namespace paceline
