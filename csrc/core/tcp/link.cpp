#include "core/tcp/link.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace paceline {
namespace {

bool is_transient(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

Link::Link(Fd socket, Handshake greeting, bool dialer, Nanoseconds until)
    : phase(dialer ? Phase::dialing : Phase::greeting),
      handshake(std::move(greeting)),
      is_dialer(dialer),
      deadline(until),
      socket_(std::move(socket)) {}

void Link::mark_broken(std::string why) {
  if (phase == Phase::broken) return;
  phase = Phase::broken;
  why_ = std::move(why);
}

Link::Result Link::greet() {
  if (phase == Phase::dialing) {
    if (const int error = socket_error(socket_)) {
      mark_broken(std::strerror(error));
      return Result::broken;
    }
    phase = Phase::greeting;
  }
  bool has_moved = false;
  for (;;) {
    if (const auto out = handshake.outgoing(); !out.empty()) {
      const auto n = ::send(socket_.get(), out.data(), out.size(), MSG_NOSIGNAL);
      if (n < 0 && is_transient(errno)) break;
      if (n < 0) {
        mark_broken(std::strerror(errno));
        return Result::broken;
      }
      handshake.sent(static_cast<std::size_t>(n));
      has_moved = true;
      continue;
    }
    if (handshake.state() == Handshake::State::done) {
      phase = Phase::ready;
      staging_ = std::make_unique_for_overwrite<std::byte[]>(staging_bytes);
      return Result::moved;
    }
    // Only as much as the handshake wants is taken: what follows belongs to frames.
    const auto wanted = handshake.wanted();
    const auto n = ::recv(socket_.get(), wanted.data(), wanted.size(), 0);
    if (n < 0 && is_transient(errno)) break;
    if (n <= 0) {
      mark_broken(n == 0 ? "closed during the handshake" : std::strerror(errno));
      return Result::broken;
    }
    handshake.received(static_cast<std::size_t>(n));
    has_moved = true;
    if (handshake.state() == Handshake::State::refused) {
      mark_broken("authentication failed: is the job's secret the same on both sides?");
      return Result::broken;
    }
  }
  return has_moved ? Result::moved : Result::idle;
}

Link::Result Link::write(const LinkFrameHeader& header, const std::byte* slice, Outgoing* message) {
  out_header_ = header;
  out_slice_ = slice;
  out_left_header_ = sizeof out_header_;
  out_left_slice_ = header.num_bytes;
  out_message_ = message;
  return write_on();
}

Link::Result Link::write_on() {
  bool has_moved = false;
  while (is_writing()) {
    auto* header = reinterpret_cast<std::byte*>(&out_header_) + (sizeof out_header_ - out_left_header_);
    iovec parts[2] = {{header, out_left_header_}, {const_cast<std::byte*>(out_slice_), out_left_slice_}};
    msghdr message{};
    message.msg_iov = out_left_header_ ? parts : parts + 1;
    message.msg_iovlen = (out_left_header_ ? 1 : 0) + (out_left_slice_ ? 1 : 0);
    const auto n = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && is_transient(errno)) break;
    if (n < 0) return Result::broken;  // what has arrived is still to be read: the reader finds out why
    bytes_written_ += static_cast<std::uint64_t>(n);
    has_moved = true;
    const std::size_t of_header = std::min(out_left_header_, static_cast<std::size_t>(n));
    out_left_header_ -= of_header;
    out_left_slice_ -= static_cast<std::size_t>(n) - of_header;
    out_slice_ += static_cast<std::size_t>(n) - of_header;
  }
  return has_moved ? Result::moved : Result::idle;
}

void Link::advance_slice(FrameSink& sink, std::size_t num_bytes) {
  if (in_target_) {
    if (in_header_.is_checked) in_checksum_ = crc32c(in_checksum_, in_target_, num_bytes);
    in_target_ += num_bytes;
  }
  in_left_ -= num_bytes;
  if (in_left_ == 0 && in_target_ && in_header_.is_checked && in_checksum_ != in_header_.checksum) {
    mark_broken("checksum of a slice is wrong: bytes were corrupted on the way");
    return;
  }
  sink.frame_moves(*this, num_bytes, in_left_ == 0);
}

// Consumes the staged bytes, slices and headers, until a header is incomplete.
Link::Result Link::parse(FrameSink& sink) {
  while (phase == Phase::ready) {
    if (in_left_ > 0) {
      const std::size_t n = std::min(in_left_, end_ - begin_);
      if (n == 0) break;
      if (in_target_) std::memcpy(in_target_, staging_.get() + begin_, n);
      begin_ += n;
      advance_slice(sink, n);
      continue;
    }
    if (end_ - begin_ < sizeof in_header_) break;
    std::memcpy(&in_header_, staging_.get() + begin_, sizeof in_header_);
    begin_ += sizeof in_header_;
    const char* defect = defect_of(in_header_);
    if (!defect && in_header_.is_checked) {
      in_checksum_ = checksum_of(in_header_);
      if (in_header_.num_bytes == 0 && in_checksum_ != in_header_.checksum)
        defect = "checksum of a header is wrong";
    }
    if (!defect) {
      in_left_ = in_header_.num_bytes;
      in_target_ = sink.frame_begins(*this, in_header_, defect);
    }
    if (defect) {
      mark_broken(std::string("bytes that are not a frame: ") + defect);
    } else if (in_left_ == 0) {
      sink.frame_moves(*this, 0, true);
    }
  }
  if (begin_ == end_) begin_ = end_ = 0;
  return phase == Phase::ready ? Result::moved : Result::broken;
}

Link::Result Link::read(FrameSink& sink) {
  std::size_t budget = 4 * slice_bytes;  // after that, other links have their turn
  bool has_moved = false;
  while (phase == Phase::ready && budget > 0) {
    if (begin_ > 0) {  // less than a header is left
      std::memmove(staging_.get(), staging_.get() + begin_, end_ - begin_);
      end_ -= begin_;
      begin_ = 0;
    }
    // A long slice goes straight to its place, and what follows it into the staging area.
    const std::size_t direct = in_target_ && end_ == 0 ? in_left_ : 0;
    iovec parts[2] = {{in_target_, direct}, {staging_.get() + end_, staging_bytes - end_}};
    msghdr message{};
    message.msg_iov = direct ? parts : parts + 1;
    message.msg_iovlen = direct ? 2 : 1;
    const auto n = ::recvmsg(socket_.get(), &message, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && is_transient(errno)) break;
    if (n <= 0) {
      mark_broken(n == 0 ? "closed by the peer" : std::strerror(errno));
      return Result::broken;
    }
    has_moved = true;
    const auto got = static_cast<std::size_t>(n);
    const std::size_t asked = direct + staging_bytes - end_;
    const std::size_t in_place = std::min(direct, got);
    if (in_place > 0) advance_slice(sink, in_place);
    end_ += got - in_place;
    if (parse(sink) == Result::broken) return Result::broken;
    if (got < asked) break;  // the socket is empty: epoll tells when there is more
    budget -= std::min(budget, got);
  }
  return has_moved ? Result::moved : Result::idle;
}

}  // namespace paceline
