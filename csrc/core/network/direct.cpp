#include "core/network/direct.h"

#include <algorithm>
#include <cstring>

namespace paceline {
namespace {

// The finaliser of splitmix64: tags of different operations practically never collide.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

constexpr std::size_t urgent_bytes = 64
                                     << 10;  // operations up to this size overtake the slices of larger ones

}  // namespace

int GroupTransport::rank_of(int world_rank) const {
  const auto found = std::ranges::find(world_ranks, world_rank);
  return found == world_ranks.end() ? -1 : static_cast<int>(found - world_ranks.begin());
}

Tag GroupTransport::tag(std::uint64_t sequence, std::uint64_t phase) const {
  return mix(mix(mix(std::uint64_t{space} + 1) + sequence) * 512 + phase);
}

std::size_t default_one_step_bytes(int size) {
  if (size <= 2) return 128 << 10;
  return size <= 4 ? 8 << 10 : 2 << 10;
}

void check_call(const Operation& op, int peer, const CallHeader& theirs) {
  const CollectiveCall ours = CollectiveCall::of(op.request);
  if (!(theirs.call == ours)) throw Failed(mismatch(ours, theirs.call, peer, "rank " + std::to_string(peer)));
}

Flight::Flight(GroupTransport& ranks, Operation& op, std::size_t max_transfers) : ranks_(ranks), op_(op) {
  transfers_.reserve(max_transfers);
}

Flight::~Flight() {
  for (Transfer& t : transfers_)
    if (t.state == Transfer::State::pending) ranks_.transport->cancel(t);
}

Transfer& Flight::post(int peer, std::uint64_t phase, std::byte* data, std::size_t num_bytes, bool is_send) {
  if (transfers_.size() == transfers_.capacity())
    throw Failed({FailureKind::protocol, -1, "an operation made more transfers than it planned"});
  Transfer& t = transfers_.emplace_back();
  t.peer = ranks_.world_rank(peer);
  t.tag = ranks_.tag(op_.sequence, phase);
  t.data = data;
  t.num_bytes = num_bytes;
  t.priority = op_.request.numel * size_of(op_.request.dtype) <= urgent_bytes ? 1 : 0;
  if (is_send) ranks_.transport->post_send(t);
  else ranks_.transport->post_receive(t);
  return t;
}

Transfer& Flight::send(int peer, std::uint64_t phase, const std::byte* data, std::size_t num_bytes) {
  return post(peer, phase, const_cast<std::byte*>(data), num_bytes, true);
}

Transfer& Flight::receive(int peer, std::uint64_t phase, std::byte* data, std::size_t num_bytes) {
  return post(peer, phase, data, num_bytes, false);
}

bool Flight::has_landed(Transfer& t) {
  if (t.state == Transfer::State::done) return true;
  op_.waiting_for = ranks_.rank_of(t.peer);
  if (t.state == Transfer::State::pending) return false;
  Failure failure = ranks_.explain(t);
  if (failure.kind == FailureKind::mismatch)
    failure.detail += ": all ranks must make the same calls, of the same sizes, in the same order";
  throw Failed(failure);
}

bool Flight::is_landed() {
  while (num_landed_ < transfers_.size() && transfers_[num_landed_].state == Transfer::State::done)
    ++num_landed_;
  if (num_landed_ == transfers_.size()) return true;
  for (std::size_t i = transfers_.size(); i-- > num_landed_;) (void)has_landed(transfers_[i]);
  return false;
}

Task run_directly(GroupTransport& ranks, Operation& op) {
  if (is_reduction(op.request.kind)) return combine_directly(ranks, op);
  if (op.request.kind == OperationKind::barrier) return barrier_directly(ranks, op);
  if (op.request.kind == OperationKind::broadcast) return broadcast_directly(ranks, op);
  return exchange_directly(ranks, op);
}

}  // namespace paceline
