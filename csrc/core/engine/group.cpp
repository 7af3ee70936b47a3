#include "core/engine/group.h"

#include "core/engine/engine.h"
#include "core/engine/transport.h"

namespace paceline {

const char* name_of(OperationKind kind) {
  static constexpr const char* names[num_kinds] = {
      "all_reduce", "reduce",     "reduce_scatter", "broadcast", "all_gather", "gather",
      "scatter",    "all_to_all", "barrier",        "send",      "recv"};
  return names[static_cast<int>(kind)];
}

std::string Group::describe(const Operation& op) const {
  const Request& r = op.request;
  std::string text = name(rank_) + ": " + name_of(r.kind);
  if (r.kind == OperationKind::send || r.kind == OperationKind::receive)
    return text + " (tag " + std::to_string(r.tag) + ", " + std::to_string(r.numel) + " x " +
           name_of(r.dtype) + ")";
  return text + " #" + std::to_string(op.sequence) + " (" + std::to_string(r.numel) + " x " +
         name_of(r.dtype) + ")";
}

int Group::awaited_rank() const {
  // A rank that gave up passes on which rank it blames: its answer may overtake its farewell, and it must not
  // look idle.
  if (failure_.kind == FailureKind::aborted) return Respondent::nobody;
  if (failure_) return failure_.rank < 0 ? Respondent::unknown : failure_.rank;
  if (queue_.empty()) return Respondent::nobody;
  const int r = queue_.front()->waiting_for;
  return r < 0 ? Respondent::unknown : r;
}

void Group::enqueue(const OperationPointer& op) {
  const OperationKind kind = op->request.kind;
  if (kind == OperationKind::send || kind == OperationKind::receive) return enqueue_message(op);
  op->is_announced = op->sequence != 0;
  if (!op->is_announced) op->sequence = next_sequence_++;
  queue_.push_back(op);
  if (queue_.size() == 1) {
    op->task = start(*op);
    progress();
  }
}

bool Group::progress() {
  bool moved = has_messages() && progress_messages();
  if (queue_.empty()) return moved;
  const OperationPointer op = queue_.front();
  try {
    did_move = false;
    moved |= op->task.step() || did_move;
    if (op->task.is_done()) {
      finish(op, {});
      if (!queue_.empty()) queue_.front()->task = start(*queue_.front());
    }
  } catch (const Failed& error) {
    Failure failure = error.failure;
    failure.detail = describe(*op) + ": " + failure.detail;
    fail(failure);
    moved = true;
  }
  return moved;
}

void Group::finish(const OperationPointer& op, Failure failure) {
  if (!failure) succeeded(*op);
  queue_.pop_front();
  op->task.reset();
  op->failure = std::move(failure);
  engine_.completed(*op);
}

void Group::fail(const Failure& failure) {
  if (failure_) return;
  failure_ = failure;
  failed(failure);
  while (!queue_.empty()) finish(OperationPointer(queue_.front()), failure);
  fail_messages(failure);
}

Failure Group::peer_gave_up(int r, FailureKind kind, int culprit) const {
  std::string why = name(rank_) + ": " + name(r) + " gave up";
  if (kind == FailureKind::timeout) why += ": it waited too long for " + name(culprit);
  if (kind == FailureKind::peer_lost) why += " because it lost " + name(culprit);
  if (kind == FailureKind::mismatch) why += ": its call and that of " + name(culprit) + " did not match";
  return {kind, culprit, why};
}

std::string waited_text(const Operation& op, Nanoseconds now) {
  return std::to_string(static_cast<double>(now - op.started) / second_ns).substr(0, 5) + " s";
}

Failure Group::lateness(Nanoseconds now) const {
  if (queue_.empty() || now < queue_.front()->deadline) return {};
  const Operation& op = *queue_.front();
  const std::string from = op.waiting_for < 0 ? "the peers" : name(op.waiting_for);
  return {FailureKind::timeout, op.waiting_for,
          describe(op) + ": nothing from " + from + " for " + waited_text(op, now) +
              "; its process exists: is it stopped or slow?"};
}

}  // namespace paceline
