// The transport over TCP: several links per pair of ranks, opened when first needed, authenticated both ways.
//
// A message is cut into slices, and the next link of the pair that is free takes the next slice. Messages are
// numbered per pair and matched in that order. A message that fits the receiver's credit is sent unasked (and
// waits in a stash if no receive is posted yet); a larger one is announced and sent when it is accepted.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "core/engine/transport.h"
#include "core/tcp/link_table.h"
#include "core/tcp/message_receiver.h"
#include "core/tcp/send_queue.h"
#include "core/tcp/tcp_options.h"

namespace paceline {

class TcpTransport final : public Transport, private LinkUser, private ControlSender {
 public:
  // Listens. Throws std::invalid_argument or std::system_error.
  explicit TcpTransport(TcpOptions options);
  ~TcpTransport() override { close(); }
  TcpTransport(const TcpTransport&) = delete;
  TcpTransport& operator=(const TcpTransport&) = delete;

  // Where peers reach this rank, "10.0.0.1:4000,[fd00::1]:4001": one endpoint per rail.
  std::string endpoints() const { return links_.endpoints(); }
  // The endpoints of all ranks, in order of rank; before anything else is called.
  void set_peers(const std::vector<std::string>& endpoints_of_ranks) { links_.set_peers(endpoints_of_ranks); }

  void post_send(Transfer& transfer) override;
  void post_receive(Transfer& transfer) override;
  bool progress() override { return !is_closed_ && links_.progress(); }
  void cancel(Transfer& transfer) override;
  int event_fd() const override { return links_.event_fd(); }
  void watch(int peer) override;
  bool is_lost(int peer) const override { return links_.failure(peer) && !links_.has_said_goodbye(peer); }
  void ask(int peer, std::uint32_t space, std::uint64_t question) override;
  void set_respondent(std::uint32_t space, Respondent* respondent) override;
  std::uint64_t wire_bytes_sent() const override { return links_.bytes_written(); }
  void close() override;

  // Ready links to `peer`, and connections that have not proven themselves yet.
  int num_links(int peer) const { return static_cast<int>(links_.links(peer).size()); }
  int num_guests() const { return links_.num_guests(); }

 private:
  std::byte* frame_begins(Link& link, const LinkFrameHeader& header, const char*& defect) override;
  void frame_moves(Link& link, std::size_t num_bytes, bool is_last) override;
  void link_ready(Link& link) override { serve_link(link); }
  void link_writable(Link& link) override;
  void peer_lost(int peer, const Failure& failure, bool is_last) override;
  void send_control(int peer, const LinkFrameHeader& frame) override;

  SendQueue& queue(int peer) { return queues_[static_cast<std::size_t>(peer)]; }
  bool write_next(Link& link);
  void after_write(Link& link, Link::Result result);
  void serve_link(Link& link);
  void serve_peer(int peer);
  void dial_or_serve(int peer);
  void converse(int peer, const LinkFrameHeader& header);

  TcpOptions options_;
  LinkTable links_;
  MessageReceiver receiver_;
  std::vector<SendQueue> queues_;       // by peer
  std::vector<std::size_t> next_link_;  // by peer: the link whose turn it is, if there are several rails
  std::map<std::uint32_t, Respondent*> respondents_;  // by group
  bool is_closed_ = false;
};

}  // namespace paceline
