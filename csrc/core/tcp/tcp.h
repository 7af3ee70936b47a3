// The transport over TCP: several links per pair of ranks, opened when first needed, authenticated both ways.
//
// A message is cut into slices, and whichever link of the pair is free takes the next one. Messages are numbered
// per pair and matched in that order. A message that fits the receiver's credit is sent unasked (and waits in
// a stash if no receive is posted yet); a larger one is announced and sent when it is accepted.
#pragma once
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/tcp/inbox.h"
#include "core/tcp/link.h"
#include "core/network/transport.h"

namespace paceline {

struct TcpOptions {
  int rank = 0;
  int size = 1;
  std::vector<std::byte> secret;     // of the job
  std::vector<std::byte> session;    // differs between jobs and restarts that share a secret
  std::string interfaces;            // names or addresses, one rail each; empty: the one that leads to `towards`
  std::string towards = "127.0.0.1"; // a numeric address that every rank can reach, as the rendezvous
  int links_per_peer = 0;            // per rail; 0: one on loopback, else two
  bool checks = false;               // CRC-32C over every frame
  double connect_timeout_s = 30.0;
  LinkOptions link;
};

class TcpTransport final : public Transport, private FrameSink {
 public:
  // Listens. Throws std::invalid_argument or std::system_error.
  explicit TcpTransport(TcpOptions options);
  ~TcpTransport() override;
  TcpTransport(const TcpTransport&) = delete;
  TcpTransport& operator=(const TcpTransport&) = delete;

  // Where peers reach this rank, "10.0.0.1:4000,[fd00::1]:4001": one endpoint per rail.
  std::string endpoints() const;
  // The endpoints of all ranks, in order of rank; before anything else is called.
  void set_peers(const std::vector<std::string>& endpoints_of_ranks);

  void post_send(Transfer& transfer) override;
  void post_receive(Transfer& transfer) override;
  bool progress() override;
  void cancel(Transfer& transfer) override;
  int event_fd() const override { return poller_.get(); }
  void watch(int peer) override;
  bool is_lost(int peer) const override;
  void ask(int peer, std::uint32_t space, std::uint64_t question) override;
  void set_respondent(std::uint32_t space, Respondent* respondent) override;
  std::uint64_t wire_bytes_sent() const override;
  void close() override;

  // Ready links to `peer`, and connections that have not proven themselves yet.
  int num_links(int peer) const;
  int num_guests() const { return static_cast<int>(guests_.size()); }

 private:
  // A connection of our own that is being made, or made again after a refusal.
  struct Attempt {
    int number;
    double give_up_s, retry_s;
    std::unique_ptr<Link> link{};
    std::string last_error{};
  };
  struct Peer {
    std::vector<Endpoint> endpoints;
    std::vector<std::unique_ptr<Link>> links;  // ready
    std::vector<Attempt> attempts;
    std::list<Outgoing> outgoing;              // by falling priority, then in order of posting
    std::deque<FrameHeader> control;
    std::size_t next_link = 0;  // whose turn it is
    std::uint64_t next_send = 0, unasked_sent = 0, unasked_consumed = 0;
    std::uint64_t next_match = 0, unasked_received = 0, consumed = 0, consumed_told = 0;
    std::map<std::uint64_t, std::unique_ptr<Incoming>> incoming;
    bool has_dialled = false, has_said_goodbye = false, is_wanted = false;
    double wanted_since_s = 0, ending_since_s = -1;
    std::string why_ending;
    Failure failure;  // set once lost
  };

  // tcp_links.cpp: connections come and go.
  void dial_all(int peer);
  void dial_one(int peer, Attempt& attempt);
  void accept_guests();
  void greet(Link& link);
  void admit(std::unique_ptr<Link> link);
  void drop(Link& link);
  void note_ending(int peer, const std::string& why);
  void lose(int peer, FailureKind kind, const std::string& why);
  void on_timer();
  void arm_timer();
  void watch_events(Link& link, bool wants_write, bool is_new = false);
  std::unique_ptr<Link> release(Link& link);
  void bury(std::unique_ptr<Link> link);
  int links_wanted(int peer) const;
  void read(Link& link);

  // tcp_messages.cpp: frames and messages.
  std::byte* frame_begins(Link& link, const FrameHeader& header, const char*& defect) override;
  void frame_moves(Link& link, std::size_t num_bytes, bool is_last) override;
  std::byte* data_begins(Link& link, const FrameHeader& header, const char*& defect);
  void send_to_self(Transfer& transfer);
  Incoming& note_message(int peer, const FrameHeader& header, bool is_announced);
  void match_in_order(int peer);
  void bind(Incoming& message, Transfer& receive);
  void settle(Incoming& message);
  void consume(int peer, std::size_t num_bytes);
  void converse(int peer, const FrameHeader& header);
  bool is_within_credit(const Peer& peer, std::size_t num_bytes) const;
  bool take_frame(int peer, FrameHeader& header, const std::byte*& slice, Outgoing*& message);
  bool write_next(Link& link);  // a frame, if there is one and the link is free
  void serve_link(Link& link);
  void serve_peer(int peer);
  void after_write(Link& link, Link::Result result);
  void settle_outgoing(int peer, Outgoing& message);
  static void fail(Transfer& transfer, FailureKind kind, int rank, std::string why);

  void wait_for_delivery();
  double now_s() const;
  std::string name_of(int peer) const;

  TcpOptions options_;
  Digest key_;
  std::vector<Endpoint> rails_;
  std::vector<Fd> listeners_;
  Fd poller_, timer_;
  bool is_timer_armed_ = false, is_closed_ = false;
  std::vector<Peer> peers_;
  std::vector<std::unique_ptr<Link>> guests_;    // accepted, not yet proven
  std::vector<std::unique_ptr<Link>> graveyard_; // events of this round may still name them
  Inbox inbox_;
  std::map<std::uint32_t, Respondent*> respondents_;  // by group
  std::uint64_t wire_bytes_ = 0;  // of links that are gone
};

}  // namespace paceline
