#include "core/network/network_group.h"

#include <algorithm>

#include "core/engine/engine.h"

namespace paceline {
namespace {

constexpr std::uint64_t message_sequence = 1ull << 62;  // in the place of an operation's number
constexpr Tag farewell_tag = Tag{1} << 63;              // plus the group's id

}  // namespace

NetworkGroup::NetworkGroup(Engine& engine, std::shared_ptr<Transport> transport, std::uint32_t id, int rank,
                           std::vector<int> world_ranks)
    : Group(engine, rank, static_cast<int>(world_ranks.size())),
      transport_(std::move(transport)),
      ranks_{.transport = transport_.get(),
             .rank = rank,
             .world_ranks = std::move(world_ranks),
             .space = id,
             .one_step_bytes = default_one_step_bytes(size_),
             .did_move = &did_move,
             .explain = [this](const Transfer& t) { return explain(t); }},
      blame_chain_(ranks_, [this] { return awaited_rank(); }) {}

void NetworkGroup::watch() {
  for (int r = 0; r < size_; ++r)
    if (r != rank_) {
      transport_->watch(world_rank(r));
      prepare_farewell(expected_.emplace_back(), r);
      transport_->post_receive(expected_.back().transfer);
    }
}

void NetworkGroup::prepare_farewell(Farewell& f, int r) {
  f.transfer.peer = world_rank(r);
  f.transfer.tag = farewell_tag | ranks_.space;
  f.transfer.data = reinterpret_cast<std::byte*>(&f.words);
  f.transfer.num_bytes = sizeof f.words;
  f.transfer.priority = 255;
}

void NetworkGroup::failed(const Failure& failure) {
  if (failure.kind == FailureKind::aborted) return;
  for (int r = 0; r < size_; ++r) {
    if (r == rank_ || transport_->is_lost(world_rank(r))) continue;
    Farewell& f = sent_.emplace_back();
    prepare_farewell(f, r);
    f.words.kind = static_cast<std::uint32_t>(failure.kind);
    f.words.culprit_plus_one = static_cast<std::uint32_t>(failure.rank + 1);
    transport_->post_send(f.transfer);
  }
  transport_->progress();
}

Failure NetworkGroup::received_farewell() const {
  for (const Farewell& f : expected_) {
    const auto kind = static_cast<FailureKind>(f.words.kind);
    if (f.transfer.state != Transfer::State::done || kind == FailureKind::none || kind > FailureKind::aborted)
      continue;
    return peer_gave_up(ranks_.rank_of(f.transfer.peer), kind,
                        static_cast<int>(f.words.culprit_plus_one) - 1);
  }
  return {};
}

NetworkGroup::~NetworkGroup() {
  fail({FailureKind::aborted, rank_, "rank " + std::to_string(rank_) + ": the communicator was closed"});
  for (auto* list : {&expected_, &sent_})
    for (Farewell& f : *list)
      if (f.transfer.state == Transfer::State::pending) transport_->cancel(f.transfer);
}

Tag NetworkGroup::collective_tag(const Operation& op, int channel) const {
  return ranks_.tag(op.sequence, 256 + static_cast<std::uint64_t>(channel));
}

Failure NetworkGroup::explain(const Transfer& transfer) const {
  if (const Failure farewell = received_farewell()) return farewell;
  Failure failure = transfer.failure;
  failure.rank = ranks_.rank_of(failure.rank >= 0 ? failure.rank : transfer.peer);
  return failure;
}

Task NetworkGroup::start(Operation& op) {
  return op.request.plan ? execute(*this, op) : run_directly(ranks_, op);
}

void NetworkGroup::enqueue_message(const OperationPointer& op) {
  const Request& r = op->request;
  PendingMessage& m = messages_.emplace_back();
  m.op = op;
  m.transfer.peer = r.root == any_rank ? any_rank : world_rank(r.root);
  m.transfer.tag = ranks_.tag(message_sequence, 0) + static_cast<Tag>(r.tag);
  m.transfer.num_bytes = r.numel * size_of(r.dtype);
  const bool is_send = r.kind == OperationKind::send;
  m.transfer.data = is_send ? const_cast<std::byte*>(r.source) : r.output;
  if (is_send) transport_->post_send(m.transfer);
  else transport_->post_receive(m.transfer);
  progress_messages();
}

bool NetworkGroup::progress_messages() {
  bool moved = false;
  for (auto it = messages_.begin(); it != messages_.end();) {
    if (it->transfer.state == Transfer::State::pending) {
      ++it;
      continue;
    }
    moved = true;
    if (it->transfer.state == Transfer::State::failed) {
      Failure failure = explain(it->transfer);
      failure.detail = describe(*it->op) + ": " + failure.detail;
      fail(failure);
      return true;
    }
    it->op->request.root = ranks_.rank_of(it->transfer.peer);
    const OperationPointer op = it->op;
    it = messages_.erase(it);
    engine_.completed(*op);
  }
  return moved;
}

void NetworkGroup::fail_messages(const Failure& failure) {
  for (PendingMessage& m : messages_) {
    if (m.transfer.state == Transfer::State::pending) transport_->cancel(m.transfer);
    m.op->failure = failure;
    engine_.completed(*m.op);
  }
  messages_.clear();
}

Failure NetworkGroup::peer_failure(Group& group) const {
  if (const Failure farewell = received_farewell()) return farewell;
  for (int r = 0; r < size_ && group.running(); ++r) {
    if (r == rank_ || !transport_->is_lost(world_rank(r)) || group.progress() || !group.running()) continue;
    return {FailureKind::peer_lost, r,
            group.describe(*group.running()) + ": the connection to " + name(r) + " is lost"};
  }
  return {};
}

void NetworkGroup::check(Nanoseconds now) {
  if (!has_pending()) return;
  if (const Failure failure = peer_failure(*this)) return fail(failure);
  if (!queue_.empty())
    if (const Failure late = blame_chain_.judge(*this, *queue_.front(), now)) return fail(late);
  for (const PendingMessage& m : messages_)
    if (now >= m.op->deadline)
      return fail({FailureKind::timeout, m.op->request.root,
                   describe(*m.op) + ": " +
                       (m.op->request.root < 0 ? "the peers" : name(m.op->request.root)) +
                       " did not answer in time"});
}

}  // namespace paceline
