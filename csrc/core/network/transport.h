// How the engine moves tagged byte ranges between two ranks that share no memory.
//
// The engine owns threading: every call but `wake` comes from the one thread that holds the engine, so an
// implementation needs no locks. Nothing here blocks; the engine sleeps on `event_fd`, with deadlines of its own.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/base/failure.h"

namespace paceline {

inline constexpr int any_rank = -1;

// Both sides compute the same tag for the same message. Opaque to a transport, which matches a receive with the
// first unmatched message of the same (peer, tag); messages of one (peer, tag) arrive in the order sent.
using Tag = std::uint64_t;

// One posted send or receive. The poster owns it and its memory: both stay in place until `state` leaves
// `pending` or `cancel` has returned. A transport may use `next` to chain what it holds.
struct Transfer {
  enum class State : std::uint8_t { pending, done, failed };

  int peer = any_rank;          // world rank; any_rank on a receive takes the first match, then names its sender
  Tag tag = 0;
  std::byte* data = nullptr;
  std::size_t num_bytes = 0;    // a message of another length is a mismatch on the receiver
  std::size_t moved_bytes = 0;  // so far: for partial consumption of a receive, and for error messages
  State state = State::pending;
  Failure failure;              // set when state is failed; ranks are world ranks
  std::uint8_t priority = 0;    // higher overtakes lower between frames
  Transfer* next = nullptr;
};

// A group that peers may ask whom it waits for. Called from a transport's `progress`.
class Respondent {
 public:
  static constexpr int nobody = -1, somebody = -2;

  virtual ~Respondent() = default;
  // The world rank that this rank waits for, or because of which it gave up; `nobody` if it is in no operation,
  // `somebody` if it cannot tell.
  virtual int whom() const = 0;
  // `peer` has answered `question` with its whom().
  virtual void heard(int peer, std::uint64_t question, int whom) = 0;
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

  // Connections are opened lazily; this asks for one now, so that a peer's death is noticed even if
  // nothing is ever sent to it.
  virtual void watch(int peer) = 0;
  // Gone without a farewell. A peer that has closed its transport has done its part of what others still finish.
  virtual bool is_lost(int peer) const = 0;

  // Asks `peer` whom it waits for in group `space`. Answered even by a rank that does nothing, but not by one whose
  // process is stopped.
  virtual void ask(int peer, std::uint32_t space, std::uint64_t question) = 0;
  // Who answers in the name of group `space` and hears answers; null: no longer, and peers are told `nobody`.
  virtual void set_respondent(std::uint32_t space, Respondent* respondent) = 0;

  virtual std::uint64_t wire_bytes_sent() const = 0;

  // Drains nothing, closes everything; pending transfers fail with `aborted`.
  virtual void close() = 0;
};

}  // namespace paceline
