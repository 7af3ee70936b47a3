#include "core/tcp/tcp_transport.h"

namespace paceline {
namespace {

const Failure closed{FailureKind::aborted, -1, "the transport is closed"};

}  // namespace

TcpTransport::TcpTransport(TcpOptions options)
    : options_(std::move(options)),
      links_(options_, *this),
      receiver_(links_, *this, options_.rank, options_.size),
      queues_(static_cast<std::size_t>(options_.size)),
      next_link_(static_cast<std::size_t>(options_.size)) {}

void TcpTransport::post_send(Transfer& transfer) {
  transfer.state = Transfer::State::pending;
  transfer.moved_bytes = 0;
  if (is_closed_) return transfer.fail(closed);
  if (const Failure& failure = links_.failure(transfer.peer)) return transfer.fail(failure);
  if (transfer.peer == options_.rank) return receiver_.deliver_to_self(transfer);
  queue(transfer.peer).add(transfer);
  dial_or_serve(transfer.peer);
}

void TcpTransport::post_receive(Transfer& transfer) {
  transfer.state = Transfer::State::pending;
  transfer.moved_bytes = 0;
  if (is_closed_) return transfer.fail(closed);
  if (receiver_.match(transfer)) return;
  if (transfer.peer != any_rank) {
    if (const Failure& failure = links_.failure(transfer.peer)) return transfer.fail(failure);
    links_.expect(transfer.peer);
  }
  receiver_.add(transfer);
}

void TcpTransport::cancel(Transfer& transfer) {
  if (transfer.state != Transfer::State::pending || receiver_.cancel(transfer)) return;
  for (int rank = 0; rank < options_.size; ++rank) {
    const SendQueue::Cancelled result = queue(rank).cancel(transfer);
    if (result == SendQueue::Cancelled::not_here) continue;
    if (result == SendQueue::Cancelled::partly_sent)
      links_.lose(rank, FailureKind::aborted, "a message was cancelled after a part of it had been sent");
    return;
  }
}

void TcpTransport::watch(int rank) {
  if (rank != options_.rank && links_.links(rank).empty() && !links_.failure(rank) && !is_closed_)
    links_.dial(rank);
}

void TcpTransport::close() {
  if (is_closed_) return;
  links_.leave();
  receiver_.fail_all({FailureKind::aborted, -1, "the transport was closed"});
  is_closed_ = true;
  links_.close();
}

// ---- sending

bool TcpTransport::write_next(Link& link) {
  SendQueue::Frame frame;
  if (link.phase != Link::Phase::ready || link.is_writing() || !queue(link.peer).take(frame)) return false;
  frame.header.consumed_bytes = receiver_.take_consumed(link.peer);
  if (options_.checks) {
    frame.header.is_checked = 1;
    frame.header.checksum = crc32c(checksum_of(frame.header), frame.slice, frame.header.num_bytes);
  }
  after_write(link, link.write(frame.header, frame.slice, frame.message));
  return true;
}

void TcpTransport::after_write(Link& link, Link::Result result) {
  if (result == Link::Result::broken) {
    // Not lost yet: what the peer sent before it went is read first, and reading finds the cause.
    links_.want_write(link, false);
    return;
  }
  if (link.is_writing()) {
    if (!link.wants_write) links_.want_write(link, true);
    return;
  }
  if (link.wants_write) links_.want_write(link, false);
  if (Outgoing* message = link.outgoing()) {
    link.forget_outgoing();
    queue(link.peer).settle(*message);
  }
}

void TcpTransport::link_writable(Link& link) {
  after_write(link, link.write_on());
  serve_link(link);
}

void TcpTransport::serve_link(Link& link) {
  if (links_.has_several_rails()) return serve_peer(link.peer);
  while (write_next(link)) {}
}

// With several rails the links take turns: the kernel's queue for one rail is long enough to take all that is
// to be sent, so the first link would always be free.
void TcpTransport::serve_peer(int rank) {
  const auto& links = links_.links(rank);
  if (links_.has_several_rails()) {
    std::size_t& next = next_link_[static_cast<std::size_t>(rank)];
    for (std::size_t idle = 0; idle < links.size();)
      idle = write_next(*links[next++ % links.size()]) ? 0 : idle + 1;
    return;
  }
  for (std::size_t i = 0; i < links.size(); ++i)
    while (write_next(*links[i])) {}
}

void TcpTransport::dial_or_serve(int rank) {
  if (links_.links(rank).empty()) links_.dial(rank);
  else serve_peer(rank);
}

void TcpTransport::send_control(int peer, const LinkFrameHeader& frame) {
  queue(peer).add(frame);
  serve_peer(peer);
}

void TcpTransport::peer_lost(int peer, const Failure& failure, bool is_last) {
  queue(peer).fail_all(failure);
  receiver_.peer_lost(peer, failure, is_last);
}

// ---- receiving

std::byte* TcpTransport::frame_begins(Link& link, const LinkFrameHeader& header, const char*& defect) {
  link.incoming = nullptr;
  if (!queue(link.peer).return_credit(header.consumed_bytes)) {
    defect = "more credit returned than taken";
    return nullptr;
  }
  switch (header.kind) {
    case FrameKind::data:
      defect = receiver_.begin_slice(link, header);
      return defect ? nullptr : MessageReceiver::target_of(*link.incoming, header);
    case FrameKind::announce: defect = receiver_.begin_announced(link, header); return nullptr;
    case FrameKind::accept: queue(link.peer).accept(header.sequence); return nullptr;
    case FrameKind::goodbye: links_.note_goodbye(link.peer); return nullptr;
    case FrameKind::credit: return nullptr;
    case FrameKind::ask:
    case FrameKind::answer: converse(link.peer, header); return nullptr;
  }
  return nullptr;
}

void TcpTransport::frame_moves(Link& link, std::size_t num_bytes, bool is_last) {
  if (link.incoming) receiver_.move(link, num_bytes, is_last);
  else if (is_last) serve_peer(link.peer);  // returned credit or consent may let a message go
}

// ---- questions

void TcpTransport::ask(int rank, std::uint32_t space, std::uint64_t question) {
  if (is_closed_ || links_.failure(rank)) return;
  LinkFrameHeader header = control_frame(FrameKind::ask, question);
  header.tag = space;
  queue(rank).add(header);
  dial_or_serve(rank);
}

void TcpTransport::set_respondent(std::uint32_t space, Respondent* respondent) {
  if (respondent) respondents_[space] = respondent;
  else respondents_.erase(space);
}

// Questions are answered at once by the driver, which is any thread of the process: a process that answers is
// not stopped.
void TcpTransport::converse(int rank, const LinkFrameHeader& header) {
  const auto found = respondents_.find(static_cast<std::uint32_t>(header.tag));
  Respondent* const respondent = found == respondents_.end() ? nullptr : found->second;
  if (header.kind == FrameKind::answer) {
    if (respondent && header.total_bytes < queues_.size() + 2)
      respondent->on_answer(rank, header.sequence, static_cast<int>(header.total_bytes) - 2);
    return;
  }
  LinkFrameHeader answer = control_frame(FrameKind::answer, header.sequence);
  answer.tag = header.tag;
  answer.total_bytes =
      static_cast<std::uint64_t>((respondent ? respondent->awaited_rank() : Respondent::nobody) + 2);
  queue(rank).add(answer);  // leaves at the end of this frame
}

}  // namespace paceline
