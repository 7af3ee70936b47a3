// Connections of the TCP transport: dialling, accepting, proving, losing.
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>

#include "core/tcp/tcp.h"

namespace paceline {
namespace {

// Strangers may connect at will: few at a time, for a short time, and not one byte beyond a claim is read.
constexpr std::size_t kMaxGuests = 128;
constexpr double kGuestTime_s = 10.0;
constexpr std::size_t kMaxLinksPerPeer = 64;
constexpr double kRetry_s = 0.05, kTick_s = 0.05;
constexpr double kWanted_s = 0.5;  // a receive waits so long for its sender to dial before it dials itself
constexpr double kEnding_s = 1.0;  // after one link ended, the others have so long to deliver what is under way

}  // namespace

int TcpTransport::links_wanted(int rank) const {
  const Peer& peer = peers_[static_cast<std::size_t>(rank)];
  int per_rail = options_.links_per_peer;
  if (per_rail <= 0) {
    const bool is_near = peer.endpoints.front().is_loopback() || peer.endpoints.front().has_address_of(rails_[0]);
    per_rail = is_near ? 1 : 2;
  }
  const std::size_t rails = std::max(rails_.size(), peer.endpoints.size());
  return static_cast<int>(std::min(rails * static_cast<std::size_t>(per_rail), kMaxLinksPerPeer / 2));
}

void TcpTransport::dial_all(int rank) {
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  if (peer.has_dialled) return;
  if (peer.endpoints.empty()) return lose(rank, FailureKind::config, "its address is not known");
  peer.has_dialled = true;
  const double now = now_s();
  for (int i = 0; i < links_wanted(rank); ++i)
    peer.attempts.push_back(Attempt{i, now + options_.connect_timeout_s, now});
  for (Attempt& attempt : peer.attempts) dial_one(rank, attempt);
  arm_timer();
}

void TcpTransport::dial_one(int rank, Attempt& attempt) {
  const Peer& peer = peers_[static_cast<std::size_t>(rank)];
  const auto number = static_cast<std::size_t>(attempt.number);
  const Endpoint& remote = peer.endpoints[number % peer.endpoints.size()];
  const Endpoint& rail = rails_[number % rails_.size()];
  // With one rail on either side the route decides; with several, link k stays on its rail.
  const bool is_bound = rails_.size() > 1;
  try {
    Fd socket = dial(remote, is_bound ? &rail : nullptr);
    attempt.link = std::make_unique<Link>(
        std::move(socket), Handshake::dialer(key_, options_.rank, rank, attempt.number), true, now_s() + kGuestTime_s);
    attempt.link->peer = rank;
    watch_events(*attempt.link, true, true);
  } catch (const std::system_error& error) {
    attempt.last_error = error.what();
    attempt.retry_s = now_s() + kRetry_s;
  }
}

void TcpTransport::accept_guests() {
  for (const Fd& listener : listeners_) {
    for (int i = 0; i < 64; ++i) {
      Fd socket(::accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (!socket) break;
      if (guests_.size() >= kMaxGuests) {  // the oldest goes
        auto oldest = std::move(guests_.front());
        guests_.erase(guests_.begin());
        bury(std::move(oldest));
      }
      guests_.push_back(std::make_unique<Link>(std::move(socket), Handshake::acceptor(key_, options_.rank), false,
                                               now_s() + kGuestTime_s));
      watch_events(*guests_.back(), false, true);
      greet(*guests_.back());
    }
  }
  arm_timer();
}

void TcpTransport::watch_events(Link& link, bool wants_write, bool is_new) {
  epoll_event event{};
  event.events = EPOLLIN | (wants_write ? EPOLLOUT : 0u);
  event.data.ptr = &link;
  link.wants_write = wants_write;
  ::epoll_ctl(poller_.get(), is_new ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, link.descriptor(), &event);
}

// Takes a link out of whatever list holds it.
std::unique_ptr<Link> TcpTransport::release(Link& link) {
  const auto take = [&](std::vector<std::unique_ptr<Link>>& list) {
    const auto found = std::ranges::find_if(list, [&](const auto& p) { return p.get() == &link; });
    if (found == list.end()) return std::unique_ptr<Link>();
    auto taken = std::move(*found);
    list.erase(found);
    return taken;
  };
  if (link.peer < 0) return take(guests_);
  Peer& peer = peers_[static_cast<std::size_t>(link.peer)];
  for (Attempt& attempt : peer.attempts)
    if (attempt.link.get() == &link) return std::move(attempt.link);
  return take(peer.links);
}

void TcpTransport::greet(Link& link) {
  const Link::Result result = link.greet();
  if (link.phase == Link::Phase::ready) return admit(release(link));
  if (result == Link::Result::broken || link.phase == Link::Phase::broken) {
    auto owned = release(link);
    if (owned->peer >= 0) {  // our own attempt: try again until its time is up
      for (Attempt& attempt : peers_[static_cast<std::size_t>(owned->peer)].attempts) {
        if (attempt.link || attempt.number != owned->handshake.link()) continue;
        attempt.last_error = owned->why();
        attempt.retry_s = now_s() + kRetry_s;
      }
    }
    bury(std::move(owned));
    return;
  }
  const bool wants_write = !link.handshake.outgoing().empty();
  if (wants_write != link.wants_write) watch_events(link, wants_write);
}

void TcpTransport::admit(std::unique_ptr<Link> link) {
  const int rank = link->handshake.peer();
  const bool is_rank = rank >= 0 && rank < options_.size;
  if (!is_rank || peers_[static_cast<std::size_t>(rank)].failure ||
      peers_[static_cast<std::size_t>(rank)].links.size() >= kMaxLinksPerPeer)
    return bury(std::move(link));
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  if (link->is_dialer)
    std::erase_if(peer.attempts, [&](const Attempt& a) { return a.number == link->handshake.link(); });
  configure_link(link->socket(), options_.link);
  link->peer = rank;
  Link& admitted = *link;
  peer.links.push_back(std::move(link));
  watch_events(admitted, false);
  serve_link(admitted);
}

void TcpTransport::drop(Link& link) {
  auto owned = release(link);
  wire_bytes_ += owned->bytes_written();
  if (Outgoing* message = owned->outgoing()) --message->num_links;
  ::shutdown(owned->descriptor(), SHUT_WR);
  bury(std::move(owned));
}

// Closes a link at the end of this round of events, some of which may still name it.
void TcpTransport::bury(std::unique_ptr<Link> link) {
  link->mark_broken("dropped");
  ::epoll_ctl(poller_.get(), EPOLL_CTL_DEL, link->descriptor(), nullptr);
  graveyard_.push_back(std::move(link));
}

void TcpTransport::note_ending(int rank, const std::string& why) {
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  if (peer.failure) return;
  if (peer.ending_since_s < 0) {
    peer.ending_since_s = now_s();
    peer.why_ending = peer.has_said_goodbye ? "it closed its communicator" : why;
  }
  if (peer.links.empty()) lose(rank, FailureKind::peer_lost, peer.why_ending);
  else arm_timer();
}

void TcpTransport::lose(int rank, FailureKind kind, const std::string& why) {
  Peer& peer = peers_[static_cast<std::size_t>(rank)];
  if (peer.failure) return;
  peer.failure = {kind, rank, "connection to " + name_of(rank) + ": " + why};
  const auto fail_with_peer = [&](Transfer& transfer) {
    transfer.failure = peer.failure;
    transfer.state = Transfer::State::failed;
  };
  while (!peer.links.empty()) drop(*peer.links.back());
  for (Attempt& attempt : peer.attempts)
    if (attempt.link) bury(std::move(attempt.link));
  peer.attempts.clear();
  for (Outgoing& out : peer.outgoing) fail_with_peer(*out.transfer);
  peer.outgoing.clear();
  peer.control.clear();
  // Complete messages that nobody has asked for yet stay: they did arrive.
  for (auto it = peer.incoming.begin(); it != peer.incoming.end();) {
    Incoming& message = *it->second;
    if (message.is_complete() && it->first < peer.next_match) {
      ++it;
      continue;
    }
    if (message.receive) fail_with_peer(*message.receive);
    else if (!message.is_discarded) inbox_.remove(message);
    it = peer.incoming.erase(it);
  }
  const bool is_alone = std::ranges::all_of(
      peers_, [&](const Peer& p) { return p.failure || &p == &peers_[static_cast<std::size_t>(options_.rank)]; });
  for (Transfer* transfer : inbox_.take_receives_if(
           [&](const Transfer& t) { return t.peer == rank || (is_alone && t.peer == any_rank); }))
    fail_with_peer(*transfer);
}

void TcpTransport::on_timer() {
  std::uint64_t expirations;
  (void)!::read(timer_.get(), &expirations, sizeof expirations);
  is_timer_armed_ = false;
  const double now = now_s();
  std::erase_if(guests_, [&](auto& guest) {
    if (guest->deadline_s > now) return false;
    bury(std::move(guest));
    return true;
  });
  for (int rank = 0; rank < options_.size; ++rank) {
    Peer& peer = peers_[static_cast<std::size_t>(rank)];
    if (peer.failure) continue;
    if (peer.ending_since_s >= 0 && now - peer.ending_since_s > kEnding_s) {
      lose(rank, FailureKind::peer_lost, peer.why_ending);
      continue;
    }
    if (peer.is_wanted && now - peer.wanted_since_s > kWanted_s) {
      peer.is_wanted = false;
      if (peer.links.empty()) dial_all(rank);
    }
    for (Attempt& attempt : peer.attempts) {
      if (attempt.link && attempt.link->deadline_s < now) {
        attempt.last_error = "no answer";
        attempt.retry_s = now;
        bury(std::move(attempt.link));
      }
      if (!attempt.link && attempt.retry_s <= now && now < attempt.give_up_s) dial_one(rank, attempt);
    }
    // A rail that cannot be reached is given up; without any link the peer is lost.
    std::string error;
    std::erase_if(peer.attempts, [&](Attempt& a) {
      if (now < a.give_up_s) return false;
      error = a.last_error.empty() ? "no answer" : a.last_error;
      if (a.link) bury(std::move(a.link));
      return true;
    });
    if (!error.empty() && peer.links.empty() && peer.attempts.empty())
      lose(rank, FailureKind::peer_lost,
           "no connection within " + std::to_string(static_cast<int>(options_.connect_timeout_s)) + " s: " + error);
  }
  arm_timer();
}

void TcpTransport::arm_timer() {
  if (is_timer_armed_) return;
  const bool has_work = !guests_.empty() || std::ranges::any_of(peers_, [](const Peer& p) {
    return !p.failure && (!p.attempts.empty() || p.is_wanted || p.ending_since_s >= 0);
  });
  if (!has_work) return;
  itimerspec when{};
  when.it_value.tv_nsec = static_cast<long>(kTick_s * 1e9);
  ::timerfd_settime(timer_.get(), 0, &when, nullptr);
  is_timer_armed_ = true;
}

}  // namespace paceline
