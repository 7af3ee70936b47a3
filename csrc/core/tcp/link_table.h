// The connections of one rank: listening, dialling, accepting, authenticating, losing. Links are opened when
// they are first needed, several per pair of ranks, and each peer is lost as a whole.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "core/base/failure.h"
#include "core/tcp/link.h"
#include "core/tcp/stranger_budget.h"
#include "core/tcp/tcp_options.h"

namespace paceline {

// The layer above: what travels on the links.
class LinkUser : public FrameSink {
 public:
  // `link` has become ready, and nothing is written to it.
  virtual void link_ready(Link& link) = 0;
  // The socket takes bytes again.
  virtual void link_writable(Link& link) = 0;
  // No link to `peer` is left, and none will come. `is_last`: all other peers are lost, too.
  virtual void peer_lost(int peer, const Failure& failure, bool is_last) = 0;
};

class LinkTable {
 public:
  // Listens. Throws std::invalid_argument or std::system_error. `user` outlives this object.
  LinkTable(const TcpOptions& options, LinkUser& user);
  LinkTable(const LinkTable&) = delete;
  LinkTable& operator=(const LinkTable&) = delete;

  // Where peers reach this rank: one endpoint per rail, separated by commas.
  std::string endpoints() const;
  // The endpoints of all ranks, in order of rank; before anything else is called.
  void set_peers(const std::vector<std::string>& endpoints_of_ranks);

  int event_fd() const { return poller_.get(); }
  // Handles the events that are there; false if there are none.
  bool progress();

  // The ready links to `peer`.
  const std::vector<std::unique_ptr<Link>>& links(int peer) const { return at(peer).links; }
  // Set once `peer` is lost.
  const Failure& failure(int peer) const { return at(peer).failure; }
  bool has_several_rails() const { return rails_.size() > 1; }
  // Dials all links to `peer`, unless that was done before.
  void dial(int peer);
  // A receive waits for `peer`. Normally the sender dials; if it does not do so soon, this rank dials, to
  // learn whether the peer lives.
  void expect(int peer);
  // Whether to report when `link` takes bytes again.
  void want_write(Link& link, bool wants_write) { watch_events(link, wants_write); }

  // `peer` said that it closes: the end of its links is no failure of the network.
  void note_goodbye(int peer) { at(peer).has_said_goodbye = true; }
  bool has_said_goodbye(int peer) const { return at(peer).has_said_goodbye; }
  void lose(int peer, FailureKind kind, const std::string& why);
  // Says goodbye to all peers and loses them.
  void leave();
  // Waits a moment for the last bytes to reach the peers, and closes all sockets.
  void close();

  // Connections that have not proven themselves yet.
  int num_guests() const { return static_cast<int>(guests_.size()); }
  std::uint64_t bytes_written() const;

 private:
  // A connection that this rank is making, or will make again after a refusal.
  struct Attempt {
    int number;
    Nanoseconds give_up_at, retry_at;
    std::unique_ptr<Link> link{};
    std::string last_error{};
  };
  struct PeerLinks {
    std::vector<Endpoint> endpoints;
    std::vector<std::unique_ptr<Link>> links;  // ready
    std::vector<Attempt> attempts;
    bool has_dialled = false, has_said_goodbye = false;
    Nanoseconds expected_since = 0;  // 0: not expected to dial
    Nanoseconds ending_since = 0;    // when its first link ended; 0: none has
    std::string why_ending;
    Failure failure;
  };

  PeerLinks& at(int peer) { return peers_.at(static_cast<std::size_t>(peer)); }
  const PeerLinks& at(int peer) const { return peers_.at(static_cast<std::size_t>(peer)); }
  std::string name_of(int peer) const;
  int num_links_wanted(int peer) const;
  void dial_one(int peer, Attempt& attempt);
  void accept_guests();
  void refuse_oldest(const std::string& why);
  void refuse(std::unique_ptr<Link> guest, const std::string& why);
  void set_accepting(bool is_accepting);
  void greet(Link& link);
  void admit(std::unique_ptr<Link> link);
  void read(Link& link);
  void watch_events(Link& link, bool wants_write, bool is_new = false);
  std::unique_ptr<Link> release(Link& link);
  void drop(Link& link);
  void bury(std::unique_ptr<Link> link);
  void note_ending(int peer, const std::string& why);
  void on_timer();
  void check_attempts(int peer, Nanoseconds now);
  void arm_timer();
  void wait_for_delivery();

  const TcpOptions& options_;
  LinkUser& user_;
  Digest key_;
  std::vector<Endpoint> rails_;
  std::vector<Fd> listeners_;
  Fd poller_, timer_;
  bool is_timer_armed_ = false, is_accepting_ = true;
  StrangerBudget budget_;
  std::vector<PeerLinks> peers_;
  std::vector<std::unique_ptr<Link>> guests_;     // accepted, not yet proven
  std::vector<std::unique_ptr<Link>> graveyard_;  // events of this round may still name them
  std::uint64_t bytes_written_ = 0;               // by links that are gone
};

}  // namespace paceline
