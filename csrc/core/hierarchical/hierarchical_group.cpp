#include "core/hierarchical/hierarchical_group.h"

#include <algorithm>

#include "core/engine/engine.h"

namespace paceline {
namespace {

constexpr Nanoseconds never = INT64_MAX;  // the whole has a deadline, its parts have none

}  // namespace

MixedGroup::MixedGroup(Engine& engine, int rank, std::vector<int> hosts, Group& local, NetworkGroup& world,
                       NetworkGroup* stripe)
    : Session(engine, rank, static_cast<int>(hosts.size())),
      hosts_(std::move(hosts)),
      local_(local),
      world_(world),
      stripe_(stripe) {
  members_.resize(static_cast<std::size_t>(*std::ranges::max_element(hosts_)) + 1);
  for (int r = 0; r < size_; ++r) {
    auto& host = members_[static_cast<std::size_t>(host_of(r))];
    places_.push_back(static_cast<int>(host.size()));
    host.push_back(r);
  }
  num_stripes_ = size_;
  for (const auto& host : members_) num_stripes_ = std::min(num_stripes_, static_cast<int>(host.size()));
  if (local.size() != static_cast<int>(members(host()).size()) || local.rank() != place() ||
      (place() < num_stripes_) != (stripe != nullptr))
    throw Failed({FailureKind::config, -1, "the groups do not fit the hosts"});
  world_.inquiry().waits_for = [this] { return missing(); };
  local_.known_as = members(host());
  if (stripe_)
    for (int h = 0; h < num_hosts(); ++h) stripe_->known_as.push_back(members(h)[static_cast<std::size_t>(place())]);
}

MixedGroup::~MixedGroup() {
  world_.inquiry().waits_for = [&world = world_] { return world.waits_for(); };
  fail({FailureKind::aborted, rank_, "rank " + std::to_string(rank_) + ": the communicator was closed"});
}

OperationPointer MixedGroup::begin(Session& group, const Operation& whole, Request part) {
  if (group.failure()) throw Failed(group.failure_to_tell());
  auto op = std::make_shared<Operation>();
  op->request = std::move(part);
  op->request.dtype = whole.request.dtype;
  op->is_heavy = whole.is_heavy;
  op->started = whole.started;
  op->deadline = never;
  engine_.activate(group);
  group.enqueue(op);
  did_move = true;
  return op;
}

std::vector<Session*> MixedGroup::groups() const {
  std::vector<Session*> all{&local_, &world_};
  if (stripe_) all.push_back(stripe_);
  return all;
}

int MixedGroup::missing() const {
  if (failure_) return waits_for();
  if (queue_.empty()) return world_.waits_for();  // what is done by that group alone, as splitting
  for (const Session* g : groups())
    if (const int r = g->waits_for(); r >= 0) return g->told_rank(r);
  return Respondent::somebody;
}

bool MixedGroup::is_over(const OperationPointer& part) const {
  if (!part->is_done.load(std::memory_order_relaxed)) return false;
  if (part->failure)
    for (const Session* g : groups())
      if (g->failure()) throw Failed(g->failure_to_tell());
  return true;
}

void MixedGroup::check(Nanoseconds now) {
  if (queue_.empty()) return;
  for (Session* g : groups()) {
    if (g->has_pending() && !g->failure()) g->check(now);
    // One host's loss must reach ranks that wait for another group of theirs.
    if (queue_.empty()) return;
    if (g->failure()) return fail(g->failure_to_tell());
  }
  if (const Failure bad = world_.trouble(*this)) return fail(bad);
  if (queue_.empty()) return;
  if (const Failure late = world_.inquiry().judge(*this, *queue_.front(), now)) fail(late);
}

void MixedGroup::failed(const Failure& failure) {
  for (Session* g : groups()) {
    if (g->failure()) continue;
    Failure inside = failure;
    const auto found = std::ranges::find(g->known_as, failure.rank);
    if (failure.rank >= 0 && !g->known_as.empty())
      inside.rank = found == g->known_as.end() ? g->size() + failure.rank : static_cast<int>(found - g->known_as.begin());
    g->fail(inside);
  }
}

void MixedGroup::enqueue_message(const OperationPointer& op) {
  if (world_.failure()) {
    op->failure = world_.failure();
    return engine_.completed(*op);
  }
  engine_.activate(world_);
  world_.enqueue(op);
}

Task MixedGroup::start(Operation& op) {
  switch (op.request.kind) {
    case Kind::all_reduce:
    case Kind::reduce: return combine_mixed(*this, op);
    case Kind::reduce_scatter: return reduce_scatter_mixed(*this, op);
    case Kind::all_gather: return all_gather_mixed(*this, op);
    case Kind::broadcast: return broadcast_mixed(*this, op);
    case Kind::barrier: return barrier_mixed(*this, op);
    default: return exchange_mixed(*this, op);
  }
}

}  // namespace paceline
