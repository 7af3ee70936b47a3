#include "core/tcp/send_queue.h"

#include <algorithm>

namespace paceline {

void SendQueue::add(Transfer& transfer) {
  auto place = messages_.end();
  while (place != messages_.begin() && std::prev(place)->transfer->priority < transfer.priority) --place;
  messages_.insert(place, Outgoing{&transfer});
}

bool SendQueue::take(Frame& frame) {
  frame = Frame{};
  if (!control_.empty()) {
    frame.header = control_.front();
    control_.pop_front();
    return true;
  }
  for (Outgoing& out : messages_) {
    const std::size_t total = out.transfer->num_bytes;
    const bool is_fresh = out.phase == Outgoing::Phase::queued;
    if (!is_fresh && (out.phase == Outgoing::Phase::announced || out.taken_bytes == total)) continue;
    if (is_fresh) {
      out.sequence = next_sequence_++;
      const bool is_unasked = unasked_sent_ - unasked_consumed_ + total <= credit_bytes;
      out.phase = is_unasked ? Outgoing::Phase::flowing : Outgoing::Phase::announced;
      if (is_unasked) unasked_sent_ += total;
    }
    LinkFrameHeader& header = frame.header;
    header.tag = out.transfer->tag;
    header.total_bytes = total;
    header.sequence = out.sequence;
    if (out.phase == Outgoing::Phase::announced) {
      header.kind = FrameKind::announce;
      return true;
    }
    header.offset = out.taken_bytes;
    header.num_bytes = static_cast<std::uint32_t>(std::min(slice_bytes, total - out.taken_bytes));
    frame.slice = out.transfer->data + out.taken_bytes;
    frame.message = &out;
    out.taken_bytes += header.num_bytes;
    ++out.num_links;
    return true;
  }
  return false;
}

void SendQueue::settle(Outgoing& message) {
  --message.num_links;
  Transfer& transfer = *message.transfer;
  transfer.moved_bytes = message.taken_bytes;
  if (message.num_links > 0 || message.taken_bytes < transfer.num_bytes) return;
  messages_.remove_if([&](const Outgoing& o) { return &o == &message; });
  transfer.state = Transfer::State::done;
}

void SendQueue::accept(std::uint64_t sequence) {
  const auto found = std::ranges::find_if(messages_, [&](const Outgoing& o) {
    return o.phase == Outgoing::Phase::announced && o.sequence == sequence;
  });
  if (found != messages_.end()) found->phase = Outgoing::Phase::flowing;
}

bool SendQueue::return_credit(std::uint64_t consumed_bytes) {
  if (consumed_bytes > unasked_sent_) return false;
  unasked_consumed_ = std::max(unasked_consumed_, consumed_bytes);
  return true;
}

SendQueue::Cancelled SendQueue::cancel(const Transfer& transfer) {
  const auto found =
      std::ranges::find_if(messages_, [&](const Outgoing& o) { return o.transfer == &transfer; });
  if (found == messages_.end()) return Cancelled::not_here;
  if (found->phase != Outgoing::Phase::queued) return Cancelled::partly_sent;
  messages_.erase(found);
  return Cancelled::taken_back;
}

void SendQueue::fail_all(const Failure& failure) {
  for (Outgoing& out : messages_) out.transfer->fail(failure);
  messages_.clear();
  control_.clear();
}

}  // namespace paceline
