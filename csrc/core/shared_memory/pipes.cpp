#include "core/shared_memory/pipes.h"

#include <algorithm>
#include <cstring>

#include "core/base/ranks.h"
#include "core/engine/engine.h"
#include "core/shared_memory/shared_memory_group.h"

namespace paceline {
namespace {

constexpr std::size_t ring = Outbox::pipe_bytes;
constexpr std::uint64_t word = 16;  // headers and padded messages are whole words, so no header wraps around

std::uint64_t padded(std::uint64_t n) { return (n + word - 1) / word * word; }

bool wants(const Operation& receive, int source, std::int64_t tag) {
  const Request& r = receive.request;
  return (r.root == any_rank || r.root == source) && r.tag == tag;
}

}  // namespace

void Pipes::resize(int num_ranks) {
  outgoing_.resize(static_cast<std::size_t>(num_ranks));
  incoming_.resize(static_cast<std::size_t>(num_ranks));
}

void Pipes::enqueue(const OperationPointer& op) {
  ++num_pending_;
  if (op->request.kind == OperationKind::send) {
    outgoing_[static_cast<std::size_t>(op->request.root)].queue.push_back(op);
  } else {
    const auto stored = std::find_if(stored_.begin(), stored_.end(), [&](const StoredMessage& m) {
      return !m.claimed && wants(*op, m.source, m.tag);
    });
    if (stored == stored_.end()) {
      receives_.push_back(op);
    } else if (stored->is_complete) {
      deliver(*stored, op);
      stored_.erase(stored);
    } else {
      stored->claimed = op;
    }
  }
  progress();
}

bool Pipes::progress() {
  bool moved = false;
  for (int p = 0; p < group_.size() && num_pending_ > 0; ++p) {
    moved |= push(p);
    moved |= pull(p);
  }
  return moved;
}

bool Pipes::push(int peer) {
  OutgoingStream& out = outgoing_[static_cast<std::size_t>(peer)];
  bool moved = false;
  while (!out.queue.empty()) {
    const OperationPointer op = out.queue.front();
    Outbox::Counter& piped = group_.own().piped(peer);
    std::uint64_t at = piped.load(std::memory_order_relaxed);
    std::uint64_t room = ring - (at - group_.outbox(peer).drained(group_.rank()).load());
    std::byte* pipe = group_.own().pipe(peer);
    const std::uint64_t total = op->request.numel * size_of(op->request.dtype);
    if (room < word) break;
    if (!out.is_header_sent) {
      const MessageHeader header{op->request.tag, total};
      static_assert(sizeof header == word);
      std::memcpy(pipe + at % ring, &header, word);
      at += word;
      room -= word;
      out.is_header_sent = true;
      out.moved = 0;
    }
    while (out.moved < total && room > 0) {
      const std::uint64_t n = std::min({total - out.moved, room, ring - at % ring});
      std::memcpy(pipe + at % ring, op->request.source + out.moved, n);
      out.moved += n;
      const std::uint64_t step = out.moved == total ? padded(n) : n;  // the end of the last word stays unused
      at += step;
      room -= std::min(room, step);
    }
    group_.publish(piped, at);
    moved = true;
    if (out.moved < total) break;
    out.is_header_sent = false;
    out.queue.pop_front();
    complete(op);
  }
  return moved;
}

bool Pipes::pull(int peer) {
  IncomingStream& in = incoming_[static_cast<std::size_t>(peer)];
  Outbox::Counter& drained = group_.own().drained(peer);
  std::uint64_t at = drained.load(std::memory_order_relaxed);
  const std::uint64_t end = group_.outbox(peer).piped(group_.rank()).load();
  if (at == end) return false;
  const std::byte* pipe = group_.outbox(peer).pipe(group_.rank());
  while (at < end && !group_.failure()) {
    if (!in.is_active) {
      MessageHeader header;
      std::memcpy(&header, pipe + at % ring, word);
      at += word;
      begin(peer, header);
    }
    while (in.moved < in.num_bytes && at < end) {
      const std::uint64_t n = std::min({in.num_bytes - in.moved, end - at, ring - at % ring});
      std::byte* to = in.target ? in.target->request.output : in.stored ? in.stored->data.data() : nullptr;
      if (to) std::memcpy(to + in.moved, pipe + at % ring, n);
      in.moved += n;
      at += in.moved == in.num_bytes ? padded(n) : n;
    }
    if (in.moved == in.num_bytes) end_message(peer);
  }
  group_.publish(drained, at);
  return true;
}

void Pipes::begin(int peer, const MessageHeader& header) {
  IncomingStream& in = incoming_[static_cast<std::size_t>(peer)];
  in = {true, nullptr, nullptr, header.num_bytes, 0};
  const auto match = std::find_if(receives_.begin(), receives_.end(),
                                  [&](const OperationPointer& op) { return wants(*op, peer, header.tag); });
  if (match == receives_.end()) {
    stored_.push_back(
        {peer, header.tag, header.num_bytes, std::vector<std::byte>(header.num_bytes), false, nullptr});
    in.stored = &stored_.back();
    return;
  }
  in.target = *match;
  receives_.erase(match);
  in.target->request.root = peer;
  check_size(*in.target, peer, header.num_bytes);
}

void Pipes::check_size(const Operation& op, int source, std::uint64_t num_bytes) {
  const std::uint64_t expected = op.request.numel * size_of(op.request.dtype);
  if (num_bytes != expected)
    group_.fail({FailureKind::mismatch, source,
                 group_.describe(op) + ": rank " + std::to_string(source) + " sent " +
                     std::to_string(num_bytes) + " bytes, but " + std::to_string(expected) +
                     " were expected"});
}

void Pipes::end_message(int peer) {
  IncomingStream& in = incoming_[static_cast<std::size_t>(peer)];
  const IncomingStream finished = in;
  in = {};
  if (finished.target) return complete(finished.target);
  if (!finished.stored) return;
  finished.stored->is_complete = true;
  if (!finished.stored->claimed) return;
  deliver(*finished.stored, finished.stored->claimed);
  stored_.remove_if([&](const StoredMessage& m) { return &m == finished.stored; });
}

void Pipes::deliver(StoredMessage& message, const OperationPointer& op) {
  op->request.root = message.source;
  const OperationPointer keep = op;
  check_size(*keep, message.source, message.num_bytes);
  if (group_.failure()) return complete(keep, group_.failure());
  if (message.num_bytes > 0) std::memcpy(keep->request.output, message.data.data(), message.num_bytes);
  complete(keep);
}

void Pipes::complete(const OperationPointer& op, Failure failure) {
  if (op->is_done.load()) return;
  op->failure = std::move(failure);
  --num_pending_;
  group_.engine().completed(*op);
}

void Pipes::fail_all(const Failure& failure) {
  for (OutgoingStream& out : outgoing_) {
    for (const OperationPointer& op : std::exchange(out.queue, {})) complete(op, failure);
    out.is_header_sent = false;
  }
  for (IncomingStream& in : incoming_)
    if (const OperationPointer op = std::exchange(in.target, nullptr)) complete(op, failure);
  for (const OperationPointer& op : std::exchange(receives_, {})) complete(op, failure);
  for (StoredMessage& m : stored_)
    if (const OperationPointer op = std::exchange(m.claimed, nullptr)) complete(op, failure);
}

void Pipes::check(Nanoseconds now) {
  const auto is_gone = [&](int p) {
    return p != group_.rank() && (group_.own().left(p).load() != 0 || !group_.peer(p).is_alive());
  };
  const auto lost = [&](const Operation& op, int p) {
    group_.fail(
        {FailureKind::peer_lost, p,
         group_.describe(op) + ": rank " + std::to_string(p) + " is gone: its process ended or it closed"});
  };
  const auto late = [&](const Operation& op, int p) {
    group_.fail({FailureKind::timeout, p,
                 group_.describe(op) + ": " + (p < 0 ? "the peers" : "rank " + std::to_string(p)) +
                     (op.request.kind == OperationKind::send ? " did not receive the message in time"
                                                             : " sent no matching message in time")});
  };
  for (int p = 0; p < group_.size(); ++p) {
    const OutgoingStream& out = outgoing_[static_cast<std::size_t>(p)];
    if (out.queue.empty()) continue;
    const OperationPointer op = out.queue.front();
    if (is_gone(p)) return lost(*op, p);
    if (now >= op->deadline) return late(*op, p);
  }
  std::vector<OperationPointer> waiting(receives_.begin(), receives_.end());
  for (const IncomingStream& in : incoming_)
    if (in.target) waiting.push_back(in.target);
  for (const StoredMessage& m : stored_)
    if (m.claimed) waiting.push_back(m.claimed);
  for (const OperationPointer& op : waiting) {
    const int p = op->request.root;
    const auto is_drained = [&](int r) {
      return is_gone(r) && group_.outbox(r).piped(group_.rank()).load() == group_.own().drained(r).load();
    };
    if (p != any_rank && is_drained(p)) return lost(*op, p);
    int num_drained = 0;
    for (int r = 0; r < group_.size(); ++r) num_drained += r != group_.rank() && is_drained(r);
    if (p == any_rank && num_drained > 0 && num_drained == group_.size() - 1) return lost(*op, p);
    if (now >= op->deadline) return late(*op, p);
  }
}

}  // namespace paceline
