// One TCP connection to a peer: first the handshake, then frames in both directions. Never blocks.
#pragma once
#include <memory>
#include <string>

#include "core/base/sync.h"
#include "core/engine/transport.h"
#include "core/tcp/frame.h"
#include "core/tcp/handshake.h"
#include "core/tcp/socket.h"

namespace paceline {

class Link;
struct Incoming;

// A message that is being sent. Lives until all its slices have been handed to the kernel.
struct Outgoing {
  enum class Phase : std::uint8_t { queued, announced, flowing };

  Transfer* transfer;
  Phase phase = Phase::queued;
  std::uint64_t sequence = 0;
  std::size_t taken_bytes = 0;  // given to links
  int num_links = 0;            // that are writing a slice of it now
};

// Receives the frames that a link reads.
class FrameSink {
 public:
  virtual ~FrameSink() = default;
  // A valid header. Returns where its slice goes, null to drop it; sets `defect` to break the link.
  virtual std::byte* frame_begins(Link& link, const LinkFrameHeader& header, const char*& defect) = 0;
  // `num_bytes` more of the slice are in place; `is_last` ends the frame (also called for empty slices).
  virtual void frame_moves(Link& link, std::size_t num_bytes, bool is_last) = 0;
};

class Link {
 public:
  enum class Phase : std::uint8_t { dialing, greeting, ready, broken };
  enum class Result : std::uint8_t { idle, moved, broken };

  Link(Fd socket, Handshake handshake, bool is_dialer, Nanoseconds deadline);

  // Reads and writes for the handshake. When it is over, `phase` is ready, or broken with a reason.
  Result greet();

  Result read(FrameSink& sink);

  // Starts a frame (is_writing() must be false) and writes what the socket takes.
  Result write(const LinkFrameHeader& header, const std::byte* slice, Outgoing* message);
  // Continues the frame.
  Result write_on();

  bool is_writing() const { return out_left_header_ + out_left_slice_ > 0; }
  Outgoing* outgoing() const { return out_message_; }
  void forget_outgoing() { out_message_ = nullptr; }

  // Sends the remainder of the frame that is being read to other memory; null drops it.
  void redirect(std::byte* target) { in_target_ = target; }
  // Offset in its message of the next byte to be read.
  std::size_t position() const { return in_header_.offset + in_header_.num_bytes - in_left_; }

  void mark_broken(std::string why);

  const Fd& socket() const { return socket_; }
  int descriptor() const { return socket_.get(); }
  const std::string& why() const { return why_; }
  std::uint64_t bytes_written() const { return bytes_written_; }

  Phase phase;
  Handshake handshake;
  const bool is_dialer;
  Nanoseconds deadline;  // for becoming ready
  int peer = -1;
  Incoming* incoming = nullptr;  // message of the frame being read; the owner's
  bool wants_write = false;      // as registered with epoll; the owner's
  std::string source;            // where an accepted link comes from; the owner's

 private:
  static constexpr std::size_t staging_bytes = 64 << 10;

  Result parse(FrameSink& sink);
  void advance_slice(FrameSink& sink, std::size_t num_bytes);

  Fd socket_;
  std::string why_;
  std::uint64_t bytes_written_ = 0;

  LinkFrameHeader out_header_;
  std::size_t out_left_header_ = 0, out_left_slice_ = 0;
  const std::byte* out_slice_ = nullptr;
  Outgoing* out_message_ = nullptr;

  LinkFrameHeader in_header_;
  std::byte* in_target_ = nullptr;
  std::size_t in_left_ = 0;
  std::uint32_t in_checksum_ = 0;
  std::size_t begin_ = 0, end_ = 0;
  std::unique_ptr<std::byte[]> staging_;
};

}  // namespace paceline
