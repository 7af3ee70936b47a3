// What comes from all peers: slices are put together to messages, which are matched with receives in the
// order sent. A message that came unasked waits in a stash until its receive is posted, and holds credit
// until then.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "core/engine/transport.h"
#include "core/tcp/frame.h"
#include "core/tcp/inbox.h"
#include "core/tcp/link_table.h"

namespace paceline {

// Takes the frames that a receiver answers with: consent and credit.
class ControlSender {
 public:
  virtual ~ControlSender() = default;
  virtual void send_control(int peer, const LinkFrameHeader& frame) = 0;
};

class MessageReceiver {
 public:
  // `links` and `answers` outlive this object.
  MessageReceiver(LinkTable& links, ControlSender& answers, int own_rank, int size)
      : links_(links), answers_(answers), own_rank_(own_rank), peers_(static_cast<std::size_t>(size)) {}

  // Gives `receive` a message that has come before it; false if there is none.
  bool match(Transfer& receive);
  // Keeps `receive` until its message comes.
  void add(Transfer& receive) { inbox_.add(receive); }
  bool cancel(const Transfer& receive);
  // A message of this rank to itself is kept like one that came unasked, so that a rank which waits for the
  // send before it posts the receive does not block.
  void deliver_to_self(Transfer& send);

  // Both return why the frame is not valid, or nullptr. After a valid data frame, link.incoming is its
  // message.
  const char* begin_announced(Link& link, const LinkFrameHeader& header);
  const char* begin_slice(Link& link, const LinkFrameHeader& header);
  // Where the bytes of the slice that was begun go; null drops them.
  static std::byte* target_of(const Incoming& message, const LinkFrameHeader& header) {
    return message.is_discarded ? nullptr : message.memory() + header.offset;
  }
  // `num_bytes` more of link.incoming have arrived.
  void move(Link& link, std::size_t num_bytes, bool is_last);

  // The bytes of unasked messages from `peer` that are consumed so far; the caller tells the peer.
  std::uint64_t take_consumed(int peer) { return at(peer).consumed_told = at(peer).consumed; }

  // `is_last`: no other peer is left that could send to receives from any rank.
  void peer_lost(int peer, const Failure& failure, bool is_last);
  void fail_all(const Failure& failure);

 private:
  struct PeerMessages {
    std::map<std::uint64_t, std::unique_ptr<Incoming>> incoming;  // by sequence number
    std::uint64_t next_match = 0;  // sequence number of the next message to match
    std::uint64_t unasked_received = 0, consumed = 0, consumed_told = 0;  // bytes of unasked messages
  };

  PeerMessages& at(int peer) { return peers_[static_cast<std::size_t>(peer)]; }
  Incoming& add_message(int peer, const LinkFrameHeader& header, bool is_announced);
  void match_in_order(int peer);
  void bind(Incoming& message, Transfer& receive);
  void settle(Incoming& message);
  void consume(int peer, std::size_t num_bytes);

  LinkTable& links_;
  ControlSender& answers_;
  int own_rank_;
  Inbox inbox_;
  std::vector<PeerMessages> peers_;
};

}  // namespace paceline
