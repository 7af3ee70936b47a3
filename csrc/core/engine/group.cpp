#include "core/engine/group.h"

#include "core/engine/engine.h"
#include "core/network/transport.h"

namespace paceline {

const char* name_of(Kind kind) {
  static constexpr const char* names[num_kinds] = {"all_reduce", "reduce",     "reduce_scatter", "broadcast",
                                                   "all_gather", "gather",     "scatter",        "all_to_all",
                                                   "barrier",    "send",       "recv"};
  return names[static_cast<int>(kind)];
}

std::string Session::describe(const Operation& op) const {
  const Request& r = op.request;
  std::string text = name(rank_) + ": " + name_of(r.kind);
  if (r.kind == Kind::send || r.kind == Kind::receive)
    return text + " (tag " + std::to_string(r.tag) + ", " + std::to_string(r.numel) + " x " + name_of(r.dtype) + ")";
  return text + " #" + std::to_string(op.sequence) + " (" + std::to_string(r.numel) + " x " + name_of(r.dtype) + ")";
}

int Session::waits_for() const {
  // Whoever gave up passes on whom it blames: its answer may overtake its farewell, and it must not look idle.
  if (failure_.kind == FailureKind::aborted) return Respondent::nobody;
  if (failure_) return failure_.rank < 0 ? Respondent::somebody : failure_.rank;
  if (queue_.empty()) return Respondent::nobody;
  const int r = queue_.front()->waiting_for;
  return r < 0 ? Respondent::somebody : r;
}

void Session::enqueue(const OperationPointer& op) {
  const Kind kind = op->request.kind;
  if (kind == Kind::send || kind == Kind::receive) return enqueue_message(op);
  op->is_announced = op->sequence != 0;
  if (!op->is_announced) op->sequence = next_sequence_++;
  queue_.push_back(op);
  if (queue_.size() == 1) {
    op->task = start(*op);
    progress();
  }
}

bool Session::progress() {
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

void Session::finish(const OperationPointer& op, Failure failure) {
  if (!failure) succeeded(*op);
  queue_.pop_front();
  op->task.reset();
  op->failure = std::move(failure);
  engine_.completed(*op);
}

void Session::fail(const Failure& failure) {
  if (failure_) return;
  failure_ = failure;
  failed(failure);
  while (!queue_.empty()) finish(OperationPointer(queue_.front()), failure);
  fail_messages(failure);
}

Failure Session::lateness(Nanoseconds now) const {
  if (queue_.empty() || now < queue_.front()->deadline) return {};
  const Operation& op = *queue_.front();
  const double waited_s = static_cast<double>(now - op.started) / second_ns;
  const std::string from = op.waiting_for < 0 ? "the peers" : name(op.waiting_for);
  return {FailureKind::timeout, op.waiting_for,
          describe(op) + ": nothing from " + from + " for " + std::to_string(waited_s).substr(0, 5) +
              " s; its process exists: is it stopped or slow?"};
}

}  // namespace paceline
