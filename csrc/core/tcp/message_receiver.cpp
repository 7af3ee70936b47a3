#include "core/tcp/message_receiver.h"

#include <cstring>
#include <string>

namespace paceline {

bool MessageReceiver::match(Transfer& receive) {
  Incoming* const message = inbox_.take_message(receive.peer, receive.tag);
  if (message) bind(*message, receive);
  return message != nullptr;
}

bool MessageReceiver::cancel(const Transfer& receive) {
  if (inbox_.remove(receive)) return true;
  for (std::size_t rank = 0; rank < peers_.size(); ++rank) {
    for (auto& [sequence, message] : peers_[rank].incoming) {
      if (message->receive != &receive) continue;
      message->receive = nullptr;
      message->is_discarded = true;
      for (auto& link : links_.links(static_cast<int>(rank)))
        if (link->incoming == message.get()) link->redirect(nullptr);
      return true;
    }
  }
  return false;
}

void MessageReceiver::deliver_to_self(Transfer& send) {
  LinkFrameHeader header;
  header.sequence = at(own_rank_).next_match;
  header.tag = send.tag;
  header.total_bytes = send.num_bytes;
  Incoming& message = add_message(own_rank_, header, false);
  message.stash = std::make_unique_for_overwrite<std::byte[]>(send.num_bytes);
  if (send.num_bytes > 0) std::memcpy(message.stash.get(), send.data, send.num_bytes);
  message.note_arrival(0, send.num_bytes);
  send.moved_bytes = send.num_bytes;
  send.state = Transfer::State::done;
  match_in_order(own_rank_);
}

const char* MessageReceiver::begin_announced(Link& link, const LinkFrameHeader& header) {
  PeerMessages& peer = at(link.peer);
  if (header.sequence < peer.next_match || peer.incoming.contains(header.sequence))
    return "message announced twice";
  add_message(link.peer, header, true);
  match_in_order(link.peer);
  return nullptr;
}

const char* MessageReceiver::begin_slice(Link& link, const LinkFrameHeader& header) {
  PeerMessages& peer = at(link.peer);
  if (const auto known = peer.incoming.find(header.sequence); known != peer.incoming.end()) {
    Incoming& message = *known->second;
    if (message.total_bytes != header.total_bytes || message.tag != header.tag)
      return "slices of one message disagree";
    if (message.is_announced && !message.receive && !message.is_discarded) return "message not accepted";
    if (!message.promised.add(header.offset, header.num_bytes)) return "slice sent twice";
    link.incoming = &message;
    return nullptr;
  }
  if (header.sequence < peer.next_match) return "slice of a finished message";
  if (peer.unasked_received - peer.consumed + header.total_bytes > credit_bytes)
    return "more sent unasked than there is credit for";
  peer.unasked_received += header.total_bytes;
  Incoming& message = add_message(link.peer, header, false);
  message.promised.add(header.offset, header.num_bytes);
  link.incoming = &message;
  match_in_order(link.peer);
  if (!message.receive && !message.is_discarded)
    message.stash = std::make_unique_for_overwrite<std::byte[]>(message.total_bytes);
  return nullptr;
}

Incoming& MessageReceiver::add_message(int peer, const LinkFrameHeader& header, bool is_announced) {
  auto& place = at(peer).incoming[header.sequence];
  place.reset(new Incoming{peer, header.sequence, header.tag, header.total_bytes, is_announced});
  return *place;
}

// Messages may be matched only in the order sent; slices of a later one may have come over a faster link.
void MessageReceiver::match_in_order(int rank) {
  PeerMessages& peer = at(rank);
  for (auto it = peer.incoming.find(peer.next_match); it != peer.incoming.end();
       it = peer.incoming.find(++peer.next_match)) {
    Incoming& message = *it->second;
    if (Transfer* receive = inbox_.take_receive(rank, message.tag)) bind(message, *receive);
    else inbox_.add(message);
  }
}

void MessageReceiver::bind(Incoming& message, Transfer& receive) {
  receive.peer = message.peer;
  if (receive.num_bytes == message.total_bytes) {
    if (message.stash && message.total_bytes > 0)
      std::memcpy(receive.data, message.stash.get(), message.total_bytes);
    message.receive = &receive;
    receive.moved_bytes = message.arrived.prefix_bytes();
  } else {
    message.is_discarded = true;
    receive.fail({FailureKind::mismatch, message.peer,
                  "expected " + std::to_string(receive.num_bytes) + " bytes from rank " +
                      std::to_string(message.peer) + ", which sent " + std::to_string(message.total_bytes)});
  }
  message.stash.reset();
  bool is_arriving = false;
  for (auto& link : links_.links(message.peer)) {
    if (link->incoming != &message) continue;
    is_arriving = true;
    link->redirect(message.receive ? message.receive->data + link->position() : nullptr);
  }
  if (message.is_announced)
    answers_.send_control(message.peer, control_frame(FrameKind::accept, message.sequence));
  else consume(message.peer, message.total_bytes);
  // While a frame of it is being read, the end of that frame settles it (an empty one looks complete before).
  if (!is_arriving) settle(message);
}

void MessageReceiver::consume(int rank, std::size_t num_bytes) {
  if (rank == own_rank_) return;
  PeerMessages& peer = at(rank);
  peer.consumed += num_bytes;
  if (peer.consumed - peer.consumed_told < credit_bytes / 4) return;
  peer.consumed_told = peer.consumed;
  answers_.send_control(rank, control_frame(FrameKind::credit));
}

void MessageReceiver::move(Link& link, std::size_t num_bytes, bool is_last) {
  Incoming& message = *link.incoming;
  // A frame that is read in pieces extends the prefix with every piece.
  message.note_arrival(link.position() - num_bytes, num_bytes);
  if (is_last) link.incoming = nullptr;
  settle(message);
}

// Finishes a message that is matched and complete.
void MessageReceiver::settle(Incoming& message) {
  if (!message.is_complete() || (!message.receive && !message.is_discarded)) return;
  if (message.receive) message.receive->state = Transfer::State::done;
  at(message.peer).incoming.erase(message.sequence);
}

void MessageReceiver::peer_lost(int rank, const Failure& failure, bool is_last) {
  PeerMessages& peer = at(rank);
  // Complete messages without a receive stay: they did arrive.
  for (auto it = peer.incoming.begin(); it != peer.incoming.end();) {
    Incoming& message = *it->second;
    if (message.is_complete() && it->first < peer.next_match) {
      ++it;
      continue;
    }
    if (message.receive) message.receive->fail(failure);
    else if (!message.is_discarded) inbox_.remove(message);
    it = peer.incoming.erase(it);
  }
  for (Transfer* transfer : inbox_.take_receives_if(
           [&](const Transfer& t) { return t.peer == rank || (is_last && t.peer == any_rank); }))
    transfer->fail(failure);
}

void MessageReceiver::fail_all(const Failure& failure) {
  for (Transfer* transfer : inbox_.take_receives_if([](const Transfer&) { return true; }))
    transfer->fail(failure);
}

}  // namespace paceline
