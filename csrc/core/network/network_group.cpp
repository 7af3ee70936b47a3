#include "core/network/network_group.h"

#include <algorithm>

#include "core/engine/engine.h"

namespace paceline {
namespace {

constexpr std::uint64_t messages = 1ull << 62;  // instead of an operation's number

}  // namespace

NetworkGroup::NetworkGroup(Engine& engine, std::shared_ptr<Transport> transport, std::uint32_t id, int rank,
                           std::vector<int> world_ranks)
    : Session(engine, rank, static_cast<int>(world_ranks.size())),
      transport_(std::move(transport)),
      id_(id),
      world_ranks_(std::move(world_ranks)),
      inquiry_(*transport_, id_, rank, world_ranks_, [this] { return waits_for(); }) {
  network_.transport = transport_.get();
  network_.rank = rank;
  network_.world_ranks = world_ranks_;
  network_.space = id_;
  network_.one_step_bytes = default_one_step_bytes(size_);
  network_.did_move = &did_move;
  network_.explain = [this](const Transfer& t) { return explain(t); };
}

void NetworkGroup::watch() {
  for (int r = 0; r < size_; ++r)
    if (r != rank_) {
      transport_->watch(world_rank(r));
      exchange_farewell(expected_.emplace_back(), r);
      transport_->post_receive(expected_.back().transfer);
    }
}

void NetworkGroup::exchange_farewell(Farewell& f, int r) {
  f.transfer.peer = world_rank(r);
  f.transfer.tag = Tag{1} << 63 | id_;
  f.transfer.data = reinterpret_cast<std::byte*>(f.words);
  f.transfer.num_bytes = sizeof f.words;
  f.transfer.priority = 255;
}

void NetworkGroup::failed(const Failure& failure) {
  if (failure.kind == FailureKind::aborted) return;
  for (int r = 0; r < size_; ++r) {
    if (r == rank_ || transport_->is_lost(world_rank(r))) continue;
    Farewell& f = said_.emplace_back();
    exchange_farewell(f, r);
    f.words[0] = static_cast<std::uint32_t>(failure.kind);
    f.words[1] = static_cast<std::uint32_t>(failure.rank + 1);
    transport_->post_send(f.transfer);
  }
  transport_->progress();
}

Failure NetworkGroup::heard_farewell() const {
  for (const Farewell& f : expected_) {
    const auto kind = static_cast<FailureKind>(f.words[0]);
    if (f.transfer.state != Transfer::State::done || kind == FailureKind::none || kind > FailureKind::aborted) continue;
    const int culprit = static_cast<int>(f.words[1]) - 1;
    std::string why = name(rank_) + ": " + name(rank_of(f.transfer.peer)) + " gave up";
    if (kind == FailureKind::timeout) why += ": it waited too long for " + name(culprit);
    if (kind == FailureKind::peer_lost) why += " because it lost " + name(culprit);
    if (kind == FailureKind::mismatch) why += ": its call and that of " + name(culprit) + " did not match";
    return {kind, culprit, why};
  }
  return {};
}

NetworkGroup::~NetworkGroup() {
  fail({FailureKind::aborted, rank_, "rank " + std::to_string(rank_) + ": the communicator was closed"});
  for (auto* list : {&expected_, &said_})
    for (Farewell& f : *list)
      if (f.transfer.state == Transfer::State::pending) transport_->cancel(f.transfer);
}

Tag NetworkGroup::collective_tag(const Operation& op, int channel) const {
  return network_.tag(op.sequence, 256 + static_cast<std::uint64_t>(channel));
}

int NetworkGroup::rank_of(int world) const {
  const auto found = std::find(world_ranks_.begin(), world_ranks_.end(), world);
  return found == world_ranks_.end() ? -1 : static_cast<int>(found - world_ranks_.begin());
}

Failure NetworkGroup::translate(const Transfer& transfer) const {
  Failure failure = transfer.failure;
  failure.rank = rank_of(failure.rank >= 0 ? failure.rank : transfer.peer);
  return failure;
}

Failure NetworkGroup::explain(const Transfer& transfer) const {
  const Failure told = heard_farewell();
  return told ? told : translate(transfer);
}

Task NetworkGroup::start(Operation& op) {
  return op.request.plan ? execute(*this, op) : run_directly(network_, op);
}

void NetworkGroup::enqueue_message(const OperationPointer& op) {
  const Request& r = op->request;
  Message& m = messages_.emplace_back();
  m.op = op;
  m.transfer.peer = r.root == any_rank ? any_rank : world_rank(r.root);
  m.transfer.tag = network_.tag(messages, 0) + static_cast<Tag>(r.tag);
  m.transfer.num_bytes = r.numel * size_of(r.dtype);
  const bool is_send = r.kind == Kind::send;
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
    it->op->request.root = rank_of(it->transfer.peer);
    const OperationPointer op = it->op;
    it = messages_.erase(it);
    engine_.completed(*op);
  }
  return moved;
}

void NetworkGroup::fail_messages(const Failure& failure) {
  for (Message& m : messages_) {
    if (m.transfer.state == Transfer::State::pending) transport_->cancel(m.transfer);
    m.op->failure = failure;
    engine_.completed(*m.op);
  }
  messages_.clear();
}

Failure NetworkGroup::trouble(Session& session) const {
  if (const Failure told = heard_farewell()) return told;
  for (int r = 0; r < size_ && session.running(); ++r) {
    if (r == rank_ || !transport_->is_lost(world_rank(r)) || session.progress() || !session.running()) continue;
    return {FailureKind::peer_lost, r,
            session.describe(*session.running()) + ": the connection to " + name(r) + " is lost"};
  }
  return {};
}

void NetworkGroup::check(Nanoseconds now) {
  if (!has_pending()) return;
  if (const Failure bad = trouble(*this)) return fail(bad);
  if (!queue_.empty())
    if (const Failure late = inquiry_.judge(*this, *queue_.front(), now)) return fail(late);
  for (const Message& m : messages_)
    if (now >= m.op->deadline)
      return fail({FailureKind::timeout, m.op->request.root,
                   describe(*m.op) + ": rank " + std::to_string(m.op->request.root) + " did not answer in time"});
}

}  // namespace paceline
