#include "core/hierarchical/hierarchical_group.h"

#include <algorithm>

#include "core/engine/engine.h"

namespace paceline {
namespace {

constexpr Nanoseconds never = INT64_MAX;  // the whole operation has a deadline, its parts have none

}  // namespace

HierarchicalGroup::HierarchicalGroup(Engine& engine, int rank, std::vector<int> hosts,
                                     SharedMemoryGroup& local, NetworkGroup& world, NetworkGroup* stripe)
    : Group(engine, rank, static_cast<int>(hosts.size())),
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
  world_.blame_chain().find_awaited = [this] { return find_awaited(); };
  local_.user_ranks = members(host());
  if (stripe_)
    for (int h = 0; h < num_hosts(); ++h)
      stripe_->user_ranks.push_back(members(h)[static_cast<std::size_t>(place())]);
}

HierarchicalGroup::~HierarchicalGroup() {
  world_.blame_chain().find_awaited = [&world = world_] { return world.awaited_rank(); };
  fail({FailureKind::aborted, rank_, "rank " + std::to_string(rank_) + ": the communicator was closed"});
}

OperationPointer HierarchicalGroup::begin(Group& group, const Operation& whole, Request part) {
  if (group.failure()) throw Failed(group.user_failure());
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

std::vector<Group*> HierarchicalGroup::groups() const {
  std::vector<Group*> all{&local_, &world_};
  if (stripe_) all.push_back(stripe_);
  return all;
}

int HierarchicalGroup::find_awaited() const {
  if (failure_) return awaited_rank();
  if (queue_.empty()) return world_.awaited_rank();  // for operations of that group alone, such as splitting
  for (const Group* g : groups())
    if (const int r = g->awaited_rank(); r >= 0) return g->user_rank(r);
  return Respondent::unknown;
}

bool HierarchicalGroup::is_over(const OperationPointer& part) const {
  if (!part->is_done.load(std::memory_order_relaxed)) return false;
  if (part->failure)
    for (const Group* g : groups())
      if (g->failure()) throw Failed(g->user_failure());
  return true;
}

void HierarchicalGroup::check(Nanoseconds now) {
  if (queue_.empty()) return;
  for (Group* g : groups()) {
    if (g->has_pending() && !g->failure()) g->check(now);
    // A loss on one host must reach ranks that wait for one of the other groups.
    if (queue_.empty()) return;
    if (g->failure()) return fail(g->user_failure());
  }
  if (const Failure bad = world_.peer_failure(*this)) return fail(bad);
  if (queue_.empty()) return;
  if (const Failure late = world_.blame_chain().judge(*this, *queue_.front(), now)) fail(late);
}

void HierarchicalGroup::failed(const Failure& failure) {
  for (Group* g : groups()) {
    if (g->failure()) continue;
    Failure inside = failure;
    const auto found = std::ranges::find(g->user_ranks, failure.rank);
    if (failure.rank >= 0 && !g->user_ranks.empty()) {
      const bool is_member = found != g->user_ranks.end();
      inside.rank = is_member ? static_cast<int>(found - g->user_ranks.begin()) : g->size() + failure.rank;
    }
    g->fail(inside);
  }
}

void HierarchicalGroup::enqueue_message(const OperationPointer& op) {
  if (world_.failure()) {
    op->failure = world_.failure();
    return engine_.completed(*op);
  }
  engine_.activate(world_);
  world_.enqueue(op);
}

Task HierarchicalGroup::start(Operation& op) {
  switch (op.request.kind) {
    case OperationKind::all_reduce:
    case OperationKind::reduce: return hierarchical_combine(*this, op);
    case OperationKind::reduce_scatter: return hierarchical_reduce_scatter(*this, op);
    case OperationKind::all_gather: return hierarchical_all_gather(*this, op);
    case OperationKind::broadcast: return hierarchical_broadcast(*this, op);
    case OperationKind::barrier: return hierarchical_barrier(*this, op);
    default: return hierarchical_exchange(*this, op);
  }
}

}  // namespace paceline
