// What goes to one peer: control frames, then messages by priority, cut into slices. A message that fits the
// peer's credit is sent unasked; a larger one is announced and sent when it is accepted.
#pragma once
#include <cstddef>
#include <cstdint>
#include <deque>
#include <list>

#include "core/engine/transport.h"
#include "core/tcp/frame.h"
#include "core/tcp/link.h"

namespace paceline {

class SendQueue {
 public:
  struct Frame {
    LinkFrameHeader header;
    const std::byte* slice = nullptr;
    Outgoing* message = nullptr;  // that the slice is of
  };

  void add(Transfer& transfer);
  void add(const LinkFrameHeader& control) { control_.push_back(control); }
  // The next frame for a free link; false if there is none.
  bool take(Frame& frame);
  // A link has written its slice of `message`: finishes the message if that was the last one.
  void settle(Outgoing& message);

  // The peer accepts an announced message.
  void accept(std::uint64_t sequence);
  // The peer has consumed this many bytes of unasked messages so far; false if that exceeds what was sent to
  // it.
  bool return_credit(std::uint64_t consumed_bytes);

  enum class Cancelled : std::uint8_t { not_here, taken_back, partly_sent };
  Cancelled cancel(const Transfer& transfer);
  void fail_all(const Failure& failure);

 private:
  std::list<Outgoing> messages_;  // by falling priority, then in order of posting
  std::deque<LinkFrameHeader> control_;
  std::uint64_t next_sequence_ = 0;
  std::uint64_t unasked_sent_ = 0, unasked_consumed_ = 0;  // bytes
};

}  // namespace paceline
