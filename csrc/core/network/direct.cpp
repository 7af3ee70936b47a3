#include "core/network/direct.h"

#include <algorithm>
#include <cstring>

namespace paceline {
namespace {

// splitmix64's finaliser: tags of different operations are as good as distinct.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

constexpr std::size_t urgent_bytes = 64 << 10;  // small operations overtake the slices of large ones

}  // namespace

int Network::local(int world_rank) const {
  const auto found = std::ranges::find(world_ranks, world_rank);
  return found == world_ranks.end() ? -1 : static_cast<int>(found - world_ranks.begin());
}

Tag Network::tag(std::uint64_t sequence, std::uint64_t phase) const {
  return mix(mix(mix(space + 1) + sequence) * 512 + phase);
}

std::size_t default_one_step_bytes(int size) {
  if (size <= 2) return 128 << 10;
  return size <= 4 ? 8 << 10 : 2 << 10;
}

CallHeader CallHeader::of(const Request& request) {
  CallHeader call;
  call.kind = static_cast<std::uint32_t>(request.kind);
  call.dtype = static_cast<std::uint32_t>(request.dtype);
  if (request.kind <= Kind::reduce_scatter) call.op = static_cast<std::uint32_t>(request.op);
  call.root = static_cast<std::uint32_t>(request.root);
  call.numel = request.numel;
  return call;
}

std::string CallHeader::text() const {
  if (kind >= num_kinds || dtype >= num_dtypes || op >= num_reduce_ops) return "something unknown";
  std::string text = name_of(static_cast<Kind>(kind));
  text += "(" + std::to_string(numel) + " x " + name_of(static_cast<DType>(dtype));
  if (static_cast<Kind>(kind) <= Kind::reduce_scatter) text += std::string(", ") + name_of(static_cast<ReduceOp>(op));
  return text + ", root " + std::to_string(root) + ")";
}

void check_call(const Operation& op, int peer, const CallHeader& theirs) {
  const CallHeader ours = CallHeader::of(op.request);
  if (theirs == ours) return;
  throw Failed({FailureKind::mismatch, peer,
                "this rank called " + ours.text() + " but rank " + std::to_string(peer) + " called " + theirs.text() +
                    ": all ranks must make the same calls in the same order"});
}

Flight::Flight(Network& network, Operation& op, std::size_t max_transfers) : network_(network), op_(op) {
  transfers_.reserve(max_transfers);
}

Flight::~Flight() {
  for (Transfer& t : transfers_)
    if (t.state == Transfer::State::pending) network_.transport->cancel(t);
}

Transfer& Flight::post(int peer, std::uint64_t phase, std::byte* data, std::size_t num_bytes, bool is_send) {
  if (transfers_.size() == transfers_.capacity())
    throw Failed({FailureKind::protocol, -1, "an operation made more transfers than it planned"});
  Transfer& t = transfers_.emplace_back();
  t.peer = network_.world(peer);
  t.tag = network_.tag(op_.sequence, phase);
  t.data = data;
  t.num_bytes = num_bytes;
  t.priority = op_.request.numel * size_of(op_.request.dtype) <= urgent_bytes ? 1 : 0;
  if (is_send) network_.transport->post_send(t);
  else network_.transport->post_receive(t);
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
  op_.waiting_for = network_.local(t.peer);
  if (t.state == Transfer::State::pending) return false;
  Failure failure = network_.explain(t);
  if (failure.kind == FailureKind::mismatch)
    failure.detail += ": all ranks must make the same calls, of the same sizes, in the same order";
  throw Failed(failure);
}

bool Flight::is_landed() {
  while (num_landed_ < transfers_.size() && transfers_[num_landed_].state == Transfer::State::done) ++num_landed_;
  if (num_landed_ == transfers_.size()) return true;
  for (std::size_t i = transfers_.size(); i-- > num_landed_;) (void)has_landed(transfers_[i]);
  return false;
}

Task run_directly(Network& network, Operation& op) {
  if (op.request.kind <= Kind::reduce_scatter) return combine_directly(network, op);
  if (op.request.kind == Kind::barrier) return barrier_directly(network, op);
  if (op.request.kind == Kind::broadcast) return broadcast_directly(network, op);
  return exchange_directly(network, op);
}

}  // namespace paceline
