// How the engine moves tagged byte ranges between two ranks that share no memory.
//
// The engine owns threading: every call comes from the one thread that holds the engine's lock, so an
// implementation needs no locks. Nothing here blocks; the engine sleeps on `event_fd`, with deadlines of its
// own.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/base/failure.h"
#include "core/base/ranks.h"
#include "core/base/sync.h"

namespace paceline {

// Both sides compute the same tag for the same message. Opaque to a transport, which matches a receive with
// the first unmatched message of the same (peer, tag); messages of one (peer, tag) arrive in the order sent.
using Tag = std::uint64_t;

// One posted send or receive. The poster owns it and its memory: both stay in place until `state` leaves
// `pending` or `cancel` has returned.
struct Transfer {
  enum class State : std::uint8_t { pending, done, failed };

  int peer = any_rank;  // world rank; a receive from any_rank is set to its sender once matched
  Tag tag = 0;
  std::byte* data = nullptr;
  std::size_t num_bytes = 0;    // a message of another length is a mismatch on the receiver
  std::size_t moved_bytes = 0;  // so far; of a receive: the contiguous prefix that has arrived
  State state = State::pending;
  Failure failure;            // set when state is failed; ranks are world ranks
  std::uint8_t priority = 0;  // higher overtakes lower between frames

  void fail(const Failure& why) {
    failure = why;
    state = State::failed;
  }
};

// A group that peers may ask which rank it waits for. Called from a transport's `progress`.
class Respondent {
 public:
  // Special answers: the rank is in no operation; it waits, but cannot tell for which rank.
  static constexpr int nobody = -1, unknown = -2;
  // How long a peer may take to answer before it counts as stopped.
  static constexpr Nanoseconds patience = second_ns;

  virtual ~Respondent() = default;
  // The world rank that this rank waits for, or that made it give up; or a special answer.
  virtual int awaited_rank() const = 0;
  // `peer` has answered `question` with its awaited_rank().
  virtual void on_answer(int peer, std::uint64_t question, int awaited) = 0;
};

class Transport {
 public:
  virtual ~Transport() = default;

  // A send is done when `data` may be reused, not when it has arrived. Posting may move bytes at once, and
  // may complete at once. Posting to a lost peer fails the transfer with peer_lost.
  virtual void post_send(Transfer& transfer) = 0;
  virtual void post_receive(Transfer& transfer) = 0;

  // Moves what can be moved without blocking; true if anything did. A broken connection fails the transfers
  // of that peer with peer_lost and later ones as well.
  virtual bool progress() = 0;

  // Takes a pending transfer back: a receive loses its place; a send that has partly left breaks the
  // connection, because the stream cannot be resumed.
  virtual void cancel(Transfer& transfer) = 0;

  // Readable when `progress` has something to do (an epoll descriptor).
  virtual int event_fd() const = 0;

  // Connections are opened lazily; this opens one now, so that a peer's death is noticed even if nothing is
  // ever sent to it.
  virtual void watch(int peer) = 0;
  // Whether `peer` is gone without a farewell. A peer that closed its transport is not lost: it had finished
  // its part of the operations that others still complete.
  virtual bool is_lost(int peer) const = 0;

  // Asks `peer` which rank it waits for in group `space`. A rank that is in no operation answers too; one
  // whose process is stopped does not.
  virtual void ask(int peer, std::uint32_t space, std::uint64_t question) = 0;
  // Sets the object that answers for group `space` and receives answers. Null removes it; peers are then told
  // `nobody`.
  virtual void set_respondent(std::uint32_t space, Respondent* respondent) = 0;

  virtual std::uint64_t wire_bytes_sent() const = 0;

  // Closes all connections without draining them; pending transfers fail with `aborted`.
  virtual void close() = 0;
};

}  // namespace paceline
