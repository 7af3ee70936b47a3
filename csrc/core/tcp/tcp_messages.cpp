// Frames and messages of the TCP transport: cutting, matching, credit.
#include <algorithm>
#include <cstring>

#include "core/tcp/tcp.h"

namespace paceline {
namespace {

// What one peer may send before it is matched; bounds the memory of stashes.
constexpr std::uint64_t kCreditBytes = 8 << 20;

FrameHeader control_frame(FrameKind kind, std::uint64_t sequence = 0) {
  FrameHeader header;
  header.kind = kind;
  header.sequence = sequence;
  return header;
}

}  // namespace

void TcpTransport::fail(Transfer& transfer, FailureKind kind, int rank, std::string why) {
  transfer.failure = {kind, rank, std::move(why)};
  transfer.state = Transfer::State::failed;
}

bool TcpTransport::is_within_credit(const Peer& peer, std::size_t num_bytes) const {
  return peer.unasked_sent - peer.unasked_consumed + num_bytes <= kCreditBytes;
}

void TcpTransport::post_send(Transfer& transfer) {
  transfer.state = Transfer::State::pending;
  transfer.moved_bytes = 0;
  Peer& peer = peers_.at(static_cast<std::size_t>(transfer.peer));
  if (is_closed_) return fail(transfer, FailureKind::aborted, -1, "the transport is closed");
  if (peer.failure) {
    transfer.failure = peer.failure;
    transfer.state = Transfer::State::failed;
    return;
  }
  if (transfer.peer == options_.rank) return send_to_self(transfer);
  auto place = peer.outgoing.end();
  while (place != peer.outgoing.begin() && std::prev(place)->transfer->priority < transfer.priority) --place;
  peer.outgoing.insert(place, Outgoing{&transfer});
  if (peer.links.empty()) dial_all(transfer.peer);
  else serve_peer(transfer.peer);
}

// Kept like a message that came unasked, so that nobody who waits for the send keeps the receive from being posted.
void TcpTransport::send_to_self(Transfer& transfer) {
  FrameHeader header;
  header.sequence = peers_[static_cast<std::size_t>(options_.rank)].next_send++;
  header.tag = transfer.tag;
  header.total_bytes = transfer.num_bytes;
  Incoming& message = note_message(options_.rank, header, false);
  message.stash = std::make_unique_for_overwrite<std::byte[]>(transfer.num_bytes);
  if (transfer.num_bytes > 0) std::memcpy(message.stash.get(), transfer.data, transfer.num_bytes);
  message.note_arrival(0, transfer.num_bytes);
  transfer.moved_bytes = transfer.num_bytes;
  transfer.state = Transfer::State::done;
  match_in_order(options_.rank);
}

void TcpTransport::post_receive(Transfer& transfer) {
  transfer.state = Transfer::State::pending;
  transfer.moved_bytes = 0;
  if (is_closed_) return fail(transfer, FailureKind::aborted, -1, "the transport is closed");
  if (Incoming* message = inbox_.take_message(transfer.peer, transfer.tag)) return bind(*message, transfer);
  if (transfer.peer != any_rank) {
    Peer& peer = peers_.at(static_cast<std::size_t>(transfer.peer));
    if (peer.failure) {
      transfer.failure = peer.failure;
      transfer.state = Transfer::State::failed;
      return;
    }
    if (peer.links.empty() && !peer.is_wanted && transfer.peer != options_.rank) {
      peer.is_wanted = true;  // normally the sender opens the link; if it does not soon, we do, to know it lives
      peer.wanted_since_s = now_s();
      arm_timer();
    }
  }
  inbox_.add(transfer);
}

// ---- sending

// The next frame for a free link: control first, then the most urgent slice.
bool TcpTransport::take_frame(int rank, FrameHeader& header, const std::byte*& slice, Outgoing*& message) {
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  slice = nullptr, message = nullptr;
  if (!peer.control.empty()) {
    header = peer.control.front();
    peer.control.pop_front();
    return true;
  }
  for (Outgoing& out : peer.outgoing) {
    const std::size_t total = out.transfer->num_bytes;
    const bool is_fresh = out.phase == Outgoing::Phase::queued;
    if (!is_fresh && (out.phase == Outgoing::Phase::announced || out.taken_bytes == total)) continue;
    header = FrameHeader{};
    header.tag = out.transfer->tag;
    header.total_bytes = total;
    if (is_fresh) {
      out.sequence = peer.next_send++;
      const bool is_unasked = is_within_credit(peer, total);
      out.phase = is_unasked ? Outgoing::Phase::flowing : Outgoing::Phase::announced;
      if (is_unasked) peer.unasked_sent += total;
    }
    header.sequence = out.sequence;
    if (out.phase == Outgoing::Phase::announced) {
      header.kind = FrameKind::announce;
      return true;
    }
    header.offset = out.taken_bytes;
    header.num_bytes = static_cast<std::uint32_t>(std::min(slice_bytes, total - out.taken_bytes));
    slice = out.transfer->data + out.taken_bytes;
    out.taken_bytes += header.num_bytes;
    ++out.num_links;
    message = &out;
    return true;
  }
  return false;
}

bool TcpTransport::write_next(Link& link) {
  FrameHeader header;
  const std::byte* slice;
  Outgoing* message;
  if (link.phase != Link::Phase::ready || link.is_writing() || !take_frame(link.peer, header, slice, message))
    return false;
  Peer& peer = peers_[static_cast<std::size_t>(link.peer)];
  header.consumed_bytes = peer.consumed_told = peer.consumed;
  if (options_.checks) {
    header.is_checked = 1;
    header.checksum = crc32c(checksum_of(header), slice, header.num_bytes);
  }
  after_write(link, link.write(header, slice, message));
  return true;
}

void TcpTransport::serve_link(Link& link) {
  if (rails_.size() > 1) return serve_peer(link.peer);
  while (write_next(link)) {}
}

// With several rails the links take turns: the kernel's queue for one rail is long enough to swallow all that is under
// way, so the first link would always be free.
void TcpTransport::serve_peer(int rank) {
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  if (rails_.size() > 1) {
    for (std::size_t idle = 0; idle < peer.links.size();)
      idle = write_next(*peer.links[peer.next_link++ % peer.links.size()]) ? 0 : idle + 1;
    return;
  }
  for (std::size_t i = 0; i < peer.links.size(); ++i)
    while (write_next(*peer.links[i])) {}
}

void TcpTransport::after_write(Link& link, Link::Result result) {
  if (result == Link::Result::broken) {
    // Not lost yet: what the peer sent before it went is read first, and reading finds the cause.
    watch_events(link, false);
    return;
  }
  if (link.is_writing()) {
    if (!link.wants_write) watch_events(link, true);
    return;
  }
  if (link.wants_write) watch_events(link, false);
  if (Outgoing* message = link.outgoing()) {
    link.forget_outgoing();
    --message->num_links;
    settle_outgoing(link.peer, *message);
  }
}

void TcpTransport::settle_outgoing(int rank, Outgoing& message) {
  Transfer& transfer = *message.transfer;
  transfer.moved_bytes = message.taken_bytes;
  if (message.num_links > 0 || message.taken_bytes < transfer.num_bytes) return;
  auto& list = peers_[static_cast<std::size_t>(rank)].outgoing;
  list.remove_if([&](const Outgoing& o) { return &o == &message; });
  transfer.state = Transfer::State::done;
}

// ---- receiving

std::byte* TcpTransport::frame_begins(Link& link, const FrameHeader& header, const char*& defect) {
  Peer& peer = peers_[static_cast<std::size_t>(link.peer)];
  link.incoming = nullptr;
  if (header.consumed_bytes > peer.unasked_sent) {
    defect = "more credit returned than taken";
    return nullptr;
  }
  peer.unasked_consumed = std::max(peer.unasked_consumed, header.consumed_bytes);
  switch (header.kind) {
    case FrameKind::data: return data_begins(link, header, defect);
    case FrameKind::announce:
      if (header.sequence < peer.next_match || peer.incoming.contains(header.sequence)) {
        defect = "message announced twice";
      } else {
        note_message(link.peer, header, true);
        match_in_order(link.peer);
      }
      return nullptr;
    case FrameKind::accept: {
      const auto found = std::ranges::find_if(peer.outgoing, [&](const Outgoing& o) {
        return o.phase == Outgoing::Phase::announced && o.sequence == header.sequence;
      });
      if (found != peer.outgoing.end()) found->phase = Outgoing::Phase::flowing;
      return nullptr;
    }
    case FrameKind::goodbye: peer.has_said_goodbye = true; return nullptr;
    case FrameKind::credit: return nullptr;
    case FrameKind::ask:
    case FrameKind::answer: converse(link.peer, header); return nullptr;
  }
  return nullptr;
}

// Questions are answered at once, by whoever drives: so a process that answers is not stopped.
void TcpTransport::converse(int rank, const FrameHeader& header) {
  const auto found = respondents_.find(static_cast<std::uint32_t>(header.tag));
  Respondent* const respondent = found == respondents_.end() ? nullptr : found->second;
  if (header.kind == FrameKind::answer) {
    if (respondent && header.total_bytes < peers_.size() + 2)
      respondent->heard(rank, header.sequence, static_cast<int>(header.total_bytes) - 2);
    return;
  }
  FrameHeader answer = control_frame(FrameKind::answer, header.sequence);
  answer.tag = header.tag;
  answer.total_bytes = static_cast<std::uint64_t>((respondent ? respondent->whom() : Respondent::nobody) + 2);
  peers_[static_cast<std::size_t>(rank)].control.push_back(answer);  // leaves at the end of this frame
}

void TcpTransport::ask(int rank, std::uint32_t space, std::uint64_t question) {
  Peer& peer = peers_.at(static_cast<std::size_t>(rank));
  if (is_closed_ || peer.failure) return;
  FrameHeader header = control_frame(FrameKind::ask, question);
  header.tag = space;
  peer.control.push_back(header);
  if (peer.links.empty()) dial_all(rank);
  else serve_peer(rank);
}

void TcpTransport::set_respondent(std::uint32_t space, Respondent* respondent) {
  if (respondent) respondents_[space] = respondent;
  else respondents_.erase(space);
}

std::byte* TcpTransport::data_begins(Link& link, const FrameHeader& header, const char*& defect) {
  Peer& peer = peers_[static_cast<std::size_t>(link.peer)];
  Incoming* message = nullptr;
  if (const auto known = peer.incoming.find(header.sequence); known != peer.incoming.end()) {
    message = known->second.get();
    if (message->total_bytes != header.total_bytes || message->tag != header.tag) defect = "slices of one message disagree";
    else if (header.num_bytes > message->total_bytes - message->arrived_bytes) defect = "slice sent twice";
    else if (message->is_announced && !message->receive && !message->is_discarded) defect = "message not accepted";
  } else if (header.sequence < peer.next_match) {
    defect = "slice of a finished message";
  } else if (peer.unasked_received - peer.consumed + header.total_bytes > kCreditBytes) {
    defect = "more sent unasked than there is credit for";
  } else {
    peer.unasked_received += header.total_bytes;
    message = &note_message(link.peer, header, false);
    link.incoming = message;
    match_in_order(link.peer);
    if (!message->receive && !message->is_discarded)
      message->stash = std::make_unique_for_overwrite<std::byte[]>(message->total_bytes);
  }
  if (defect) return nullptr;
  link.incoming = message;
  return message->is_discarded ? nullptr : message->memory() + header.offset;
}

Incoming& TcpTransport::note_message(int rank, const FrameHeader& header, bool is_announced) {
  auto& place = peers_[static_cast<std::size_t>(rank)].incoming[header.sequence];
  place.reset(new Incoming{rank, header.sequence, header.tag, header.total_bytes, is_announced});
  return *place;
}

// Messages may be matched only in the order sent; slices of a later one may have come over a faster link.
void TcpTransport::match_in_order(int rank) {
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  for (auto it = peer.incoming.find(peer.next_match); it != peer.incoming.end();
       it = peer.incoming.find(++peer.next_match)) {
    Incoming& message = *it->second;
    if (Transfer* receive = inbox_.take_receive(rank, message.tag)) bind(message, *receive);
    else inbox_.add(message);
  }
}

void TcpTransport::bind(Incoming& message, Transfer& receive) {
  Peer& peer = peers_[static_cast<std::size_t>(message.peer)];
  receive.peer = message.peer;
  if (receive.num_bytes == message.total_bytes) {
    if (message.stash && message.total_bytes > 0)
      std::memcpy(receive.data, message.stash.get(), message.total_bytes);
    message.receive = &receive;
    receive.moved_bytes = message.prefix_bytes;
  } else {
    message.is_discarded = true;
    fail(receive, FailureKind::mismatch, message.peer,
         "expected " + std::to_string(receive.num_bytes) + " bytes from rank " + std::to_string(message.peer) +
             ", which sent " + std::to_string(message.total_bytes));
  }
  message.stash.reset();
  bool is_arriving = false;
  for (auto& link : peer.links) {
    if (link->incoming != &message) continue;
    is_arriving = true;
    link->redirect(message.receive ? message.receive->data + link->position() : nullptr);
  }
  if (message.is_announced) {
    peer.control.push_back(control_frame(FrameKind::accept, message.sequence));
    serve_peer(message.peer);
  } else {
    consume(message.peer, message.total_bytes);
  }
  // While a frame of it is being read, the end of that frame settles it (an empty one looks complete before).
  if (!is_arriving) settle(message);
}

void TcpTransport::consume(int rank, std::size_t num_bytes) {
  if (rank == options_.rank) return;
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  peer.consumed += num_bytes;
  if (peer.consumed - peer.consumed_told < kCreditBytes / 4) return;
  peer.consumed_told = peer.consumed;
  peer.control.push_back(control_frame(FrameKind::credit));
  serve_peer(rank);
}

void TcpTransport::frame_moves(Link& link, std::size_t num_bytes, bool is_last) {
  Incoming* message = link.incoming;
  if (message) {
    // A frame that is read in pieces moves the prefix with every piece.
    message->note_arrival(link.position() - num_bytes, num_bytes);
    if (is_last) link.incoming = nullptr;
    settle(*message);
  } else if (is_last) {
    serve_peer(link.peer);  // credit or consent may have let something go
  }
}

// Finishes a message that is matched and complete.
void TcpTransport::settle(Incoming& message) {
  if (!message.is_complete() || (!message.receive && !message.is_discarded)) return;
  if (message.receive) message.receive->state = Transfer::State::done;
  peers_[static_cast<std::size_t>(message.peer)].incoming.erase(message.sequence);
}

}  // namespace paceline
