#include "core/tcp/link_table.h"

#include <linux/sockios.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace paceline {
namespace {

constexpr int backlog = 1024;
// Strangers may connect at will: a bounded number, for a short time, and no byte beyond a claim is read.
constexpr std::size_t max_strangers = 128;  // besides the ranks of the job
constexpr Nanoseconds guest_time = 10 * second_ns;
constexpr std::size_t max_links_per_peer = 64;
constexpr Nanoseconds retry_pause = 50 * millisecond_ns;
constexpr Nanoseconds tick = 50 * millisecond_ns;
constexpr Nanoseconds expecting_time = 500 * millisecond_ns;  // see expect()
constexpr Nanoseconds ending_time =
    second_ns;  // for the other links to deliver, after one link of a peer ended
constexpr Nanoseconds farewell_time = second_ns;  // for the last bytes to reach the peers

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  for (std::size_t at = 0; at < list.size();) {
    const std::size_t comma = std::min(list.find(',', at), list.size());
    parts.push_back(list.substr(at, comma - at));
    at = comma + 1;
  }
  return parts;
}

void register_reader(const Fd& poller, const Fd& fd) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.ptr = const_cast<Fd*>(&fd);
  if (::epoll_ctl(poller.get(), EPOLL_CTL_ADD, fd.get(), &event) != 0)
    throw std::system_error(errno, std::generic_category(), "epoll_ctl");
}

}  // namespace

LinkTable::LinkTable(const TcpOptions& options, LinkUser& user)
    : options_(options), user_(user), key_(link_key(options.secret, options.session)) {
  if (options_.rank < 0 || options_.rank >= options_.size)
    throw std::invalid_argument("rank " + std::to_string(options_.rank) + " of " +
                                std::to_string(options_.size));
  rails_ = addresses_of(options_.interfaces);
  if (rails_.empty()) rails_.push_back(address_towards(Endpoint::parse(options_.towards)));
  poller_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  timer_ = Fd(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
  if (!poller_ || !timer_) throw std::system_error(errno, std::generic_category(), "epoll or timerfd");
  register_reader(poller_, timer_);
  listeners_.reserve(rails_.size());  // epoll keeps their addresses
  for (const Endpoint& rail : rails_) {
    listeners_.push_back(listen_at(rail, backlog));
    register_reader(poller_, listeners_.back());
  }
  peers_ = std::vector<PeerLinks>(static_cast<std::size_t>(options_.size));
}

std::string LinkTable::endpoints() const {
  std::string text;
  for (const Fd& listener : listeners_) {
    if (!text.empty()) text += ",";
    text += local_endpoint(listener).text();
  }
  return text;
}

void LinkTable::set_peers(const std::vector<std::string>& endpoints_of_ranks) {
  if (endpoints_of_ranks.size() != peers_.size())
    throw std::invalid_argument("endpoints of " + std::to_string(endpoints_of_ranks.size()) +
                                " ranks; expected " + std::to_string(peers_.size()));
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    peers_[i].endpoints.clear();
    for (const std::string& text : split(endpoints_of_ranks[i]))
      peers_[i].endpoints.push_back(Endpoint::parse(text));
  }
}

std::string LinkTable::name_of(int peer) const {
  const auto& endpoints = at(peer).endpoints;
  return "rank " + std::to_string(peer) + (endpoints.empty() ? "" : " (" + endpoints.front().text() + ")");
}

// ---- events

bool LinkTable::progress() {
  std::array<epoll_event, 64> events;
  const int n = ::epoll_wait(poller_.get(), events.data(), static_cast<int>(events.size()), 0);
  if (n <= 0) {
    graveyard_.clear();
    return false;
  }
  const auto* first_listener = listeners_.data();
  for (int i = 0; i < n; ++i) {
    const epoll_event& event = events[static_cast<std::size_t>(i)];
    if (event.data.ptr == &timer_) {
      on_timer();
      continue;
    }
    const auto* listener = static_cast<const Fd*>(event.data.ptr);
    if (listener >= first_listener && listener < first_listener + listeners_.size()) {
      accept_guests();
      continue;
    }
    Link& link = *static_cast<Link*>(event.data.ptr);
    if (link.phase == Link::Phase::dialing || link.phase == Link::Phase::greeting) {
      greet(link);
    } else if (link.phase == Link::Phase::ready) {
      if (event.events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read(link);
      if (link.phase == Link::Phase::ready && (event.events & EPOLLOUT)) user_.link_writable(link);
    }
  }
  graveyard_.clear();
  return true;
}

void LinkTable::read(Link& link) {
  const int rank = link.peer;
  if (link.read(user_) != Link::Result::broken) return;
  // No peer survives framing errors and half messages. After a clean end, the other links may still deliver.
  const std::string why = link.why();
  const bool is_nonsense = why.starts_with("bytes that are not") || why.starts_with("checksum");
  drop(link);
  if (is_nonsense) lose(rank, FailureKind::protocol, why);
  else note_ending(rank, why);
}

void LinkTable::watch_events(Link& link, bool wants_write, bool is_new) {
  epoll_event event{};
  event.events = EPOLLIN | (wants_write ? EPOLLOUT : 0u);
  event.data.ptr = &link;
  link.wants_write = wants_write;
  ::epoll_ctl(poller_.get(), is_new ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, link.descriptor(), &event);
}

// ---- connecting

int LinkTable::num_links_wanted(int rank) const {
  const PeerLinks& peer = at(rank);
  int per_rail = options_.links_per_peer;
  if (per_rail <= 0) {
    const bool is_near =
        peer.endpoints.front().is_loopback() || peer.endpoints.front().has_address_of(rails_[0]);
    per_rail = is_near ? 1 : 2;
  }
  const std::size_t rails = std::max(rails_.size(), peer.endpoints.size());
  return static_cast<int>(std::min(rails * static_cast<std::size_t>(per_rail), max_links_per_peer / 2));
}

void LinkTable::dial(int rank) {
  PeerLinks& peer = at(rank);
  if (peer.has_dialled) return;
  if (peer.endpoints.empty()) return lose(rank, FailureKind::config, "its address is not known");
  peer.has_dialled = true;
  const Nanoseconds now = now_ns();
  for (int i = 0; i < num_links_wanted(rank); ++i)
    peer.attempts.push_back(Attempt{i, now + options_.connect_timeout, now});
  for (Attempt& attempt : peer.attempts) dial_one(rank, attempt);
  arm_timer();
}

void LinkTable::dial_one(int rank, Attempt& attempt) {
  const PeerLinks& peer = at(rank);
  const auto number = static_cast<std::size_t>(attempt.number);
  const Endpoint& remote = peer.endpoints[number % peer.endpoints.size()];
  const Endpoint& rail = rails_[number % rails_.size()];
  // If this rank has one rail, the route decides; if it has several, link k stays on its rail.
  const Endpoint* source = has_several_rails() ? &rail : nullptr;
  try {
    Fd socket = paceline::dial(remote, source);
    attempt.link = std::make_unique<Link>(std::move(socket),
                                          Handshake::dialer(key_, options_.rank, rank, attempt.number), true,
                                          now_ns() + guest_time);
    attempt.link->peer = rank;
    watch_events(*attempt.link, true, true);
  } catch (const std::system_error& error) {
    attempt.last_error = error.what();
    attempt.retry_at = now_ns() + retry_pause;
  }
}

void LinkTable::expect(int rank) {
  PeerLinks& peer = at(rank);
  if (!peer.links.empty() || peer.expected_since != 0 || rank == options_.rank) return;
  peer.expected_since = now_ns();
  arm_timer();
}

void LinkTable::accept_guests() {
  const std::size_t max_guests = max_strangers + peers_.size();
  for (const Fd& listener : listeners_) {
    for (int i = 0; i < 64; ++i) {
      if (!budget_.may_accept(now_ns())) return set_accepting(false);
      Endpoint source;
      source.size = sizeof source.storage;
      Fd socket(::accept4(listener.get(), reinterpret_cast<sockaddr*>(&source.storage), &source.size,
                          SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (!socket) {
        if (errno != EMFILE && errno != ENFILE && errno != ENOBUFS && errno != ENOMEM) break;
        if (!guests_.empty()) refuse_oldest("this process cannot accept more connections");
        return set_accepting(false);  // without a pause, a stranger that waits would make this rank spin
      }
      budget_.spend();
      if (guests_.size() >= max_guests) refuse_oldest("too many connections without a handshake");
      guests_.push_back(std::make_unique<Link>(std::move(socket), Handshake::acceptor(key_, options_.rank),
                                               false, now_ns() + guest_time));
      guests_.back()->source = source.host();
      watch_events(*guests_.back(), false, true);
      greet(*guests_.back());
    }
  }
  arm_timer();
}

void LinkTable::refuse_oldest(const std::string& why) {
  auto oldest = std::move(guests_.front());
  guests_.erase(guests_.begin());
  refuse(std::move(oldest), why);
}

void LinkTable::refuse(std::unique_ptr<Link> guest, const std::string& why) {
  budget_.report(options_.rank, guest->source, why, now_ns());
  bury(std::move(guest));
}

// Whether new connections are accepted, or left to the kernel until the next tick.
void LinkTable::set_accepting(bool is_accepting) {
  if (is_accepting_ == is_accepting) return;
  is_accepting_ = is_accepting;
  for (const Fd& listener : listeners_) {
    if (is_accepting) register_reader(poller_, listener);
    else ::epoll_ctl(poller_.get(), EPOLL_CTL_DEL, listener.get(), nullptr);
  }
  if (!is_accepting) arm_timer();
}

void LinkTable::greet(Link& link) {
  const Link::Result result = link.greet();
  if (link.phase == Link::Phase::ready) return admit(release(link));
  if (result == Link::Result::broken || link.phase == Link::Phase::broken) {
    auto owned = release(link);
    if (owned->peer >= 0) {  // this rank's own attempt: try again until its time is up
      for (Attempt& attempt : at(owned->peer).attempts) {
        if (attempt.link || attempt.number != owned->handshake.link()) continue;
        attempt.last_error = owned->why();
        attempt.retry_at = now_ns() + retry_pause;
      }
      return bury(std::move(owned));
    }
    const std::string why = owned->why();
    return refuse(std::move(owned), why);
  }
  const bool wants_write = !link.handshake.outgoing().empty();
  if (wants_write != link.wants_write) watch_events(link, wants_write);
}

void LinkTable::admit(std::unique_ptr<Link> link) {
  const int rank = link->handshake.peer();
  const bool is_rank = rank >= 0 && rank < options_.size;
  if (!is_rank || at(rank).failure || at(rank).links.size() >= max_links_per_peer)
    return bury(std::move(link));
  PeerLinks& peer = at(rank);
  if (link->is_dialer)
    std::erase_if(peer.attempts, [&](const Attempt& a) { return a.number == link->handshake.link(); });
  configure_link(link->socket(), options_.link);
  link->peer = rank;
  Link& admitted = *link;
  peer.links.push_back(std::move(link));
  watch_events(admitted, false);
  user_.link_ready(admitted);
}

// ---- ending

// Takes a link out of the list that holds it.
std::unique_ptr<Link> LinkTable::release(Link& link) {
  const auto take = [&](std::vector<std::unique_ptr<Link>>& list) {
    const auto found = std::ranges::find_if(list, [&](const auto& p) { return p.get() == &link; });
    if (found == list.end()) return std::unique_ptr<Link>();
    auto taken = std::move(*found);
    list.erase(found);
    return taken;
  };
  if (link.peer < 0) return take(guests_);
  PeerLinks& peer = at(link.peer);
  for (Attempt& attempt : peer.attempts)
    if (attempt.link.get() == &link) return std::move(attempt.link);
  return take(peer.links);
}

void LinkTable::drop(Link& link) {
  auto owned = release(link);
  bytes_written_ += owned->bytes_written();
  if (Outgoing* message = owned->outgoing()) --message->num_links;
  ::shutdown(owned->descriptor(), SHUT_WR);
  bury(std::move(owned));
}

// Closes a link at the end of this round of events, some of which may still name it.
void LinkTable::bury(std::unique_ptr<Link> link) {
  link->mark_broken("dropped");
  ::epoll_ctl(poller_.get(), EPOLL_CTL_DEL, link->descriptor(), nullptr);
  graveyard_.push_back(std::move(link));
}

void LinkTable::note_ending(int rank, const std::string& why) {
  PeerLinks& peer = at(rank);
  if (peer.failure) return;
  if (peer.ending_since == 0) {
    peer.ending_since = now_ns();
    peer.why_ending = peer.has_said_goodbye ? "it closed its communicator" : why;
  }
  if (peer.links.empty()) lose(rank, FailureKind::peer_lost, peer.why_ending);
  else arm_timer();
}

void LinkTable::lose(int rank, FailureKind kind, const std::string& why) {
  PeerLinks& peer = at(rank);
  if (peer.failure) return;
  peer.failure = {kind, rank, "connection to " + name_of(rank) + ": " + why};
  while (!peer.links.empty()) drop(*peer.links.back());
  for (Attempt& attempt : peer.attempts)
    if (attempt.link) bury(std::move(attempt.link));
  peer.attempts.clear();
  const bool is_last =
      std::ranges::all_of(peers_, [&](const PeerLinks& p) { return p.failure || &p == &at(options_.rank); });
  user_.peer_lost(rank, peer.failure, is_last);
}

void LinkTable::on_timer() {
  std::uint64_t expirations;
  (void)!::read(timer_.get(), &expirations, sizeof expirations);
  is_timer_armed_ = false;
  const Nanoseconds now = now_ns();
  set_accepting(true);
  while (!guests_.empty() && guests_.front()->deadline <= now) refuse_oldest("no handshake within 10 s");
  for (int rank = 0; rank < options_.size; ++rank) {
    PeerLinks& peer = at(rank);
    if (peer.failure) continue;
    if (peer.ending_since != 0 && now - peer.ending_since > ending_time) {
      lose(rank, FailureKind::peer_lost, peer.why_ending);
      continue;
    }
    if (peer.expected_since != 0 && now - peer.expected_since > expecting_time) {
      peer.expected_since = 0;
      if (peer.links.empty()) dial(rank);
    }
    check_attempts(rank, now);
  }
  arm_timer();
}

void LinkTable::check_attempts(int rank, Nanoseconds now) {
  PeerLinks& peer = at(rank);
  for (Attempt& attempt : peer.attempts) {
    if (attempt.link && attempt.link->deadline < now) {
      attempt.last_error = "no answer";
      attempt.retry_at = now;
      bury(std::move(attempt.link));
    }
    if (!attempt.link && attempt.retry_at <= now && now < attempt.give_up_at) dial_one(rank, attempt);
  }
  // A rail that cannot be reached is given up; without any link the peer is lost.
  std::string error;
  std::erase_if(peer.attempts, [&](Attempt& a) {
    if (now < a.give_up_at) return false;
    error = a.last_error.empty() ? "no answer" : a.last_error;
    if (a.link) bury(std::move(a.link));
    return true;
  });
  if (!error.empty() && peer.links.empty() && peer.attempts.empty())
    lose(rank, FailureKind::peer_lost,
         "no connection within " + std::to_string(options_.connect_timeout / second_ns) + " s: " + error);
}

void LinkTable::arm_timer() {
  if (is_timer_armed_) return;
  const bool has_peer_to_check = std::ranges::any_of(peers_, [](const PeerLinks& p) {
    return !p.failure && (!p.attempts.empty() || p.expected_since != 0 || p.ending_since != 0);
  });
  if (guests_.empty() && is_accepting_ && !has_peer_to_check) return;
  itimerspec when{};
  when.it_value.tv_nsec = tick;
  ::timerfd_settime(timer_.get(), 0, &when, nullptr);
  is_timer_armed_ = true;
}

void LinkTable::leave() {
  const LinkFrameHeader goodbye = control_frame(FrameKind::goodbye);
  for (int rank = 0; rank < options_.size; ++rank) {
    for (auto& link : at(rank).links)
      if (!link->is_writing()) (void)link->write(goodbye, nullptr, nullptr);
    lose(rank, FailureKind::aborted, "the transport was closed");
  }
}

// The end of the stream counts as one unsent byte; a peer that reset the connection acknowledges nothing any
// more. Closing a socket with unread input resets the connection, and a reset discards bytes that are still
// being sent.
void LinkTable::wait_for_delivery() {
  const Nanoseconds end = now_ns() + farewell_time;
  for (const auto& link : graveyard_) {
    for (int unsent = 1; unsent > 0 && now_ns() < end;) {
      if (!is_open(link->socket()) || ::ioctl(link->descriptor(), SIOCOUTQ, &unsent) != 0 || unsent <= 1)
        break;
      std::array<std::byte, 4096> ignored;
      if (::recv(link->descriptor(), ignored.data(), ignored.size(), 0) <= 0) ::usleep(200);
    }
  }
}

void LinkTable::close() {
  wait_for_delivery();
  guests_.clear();
  graveyard_.clear();
  listeners_.clear();
}

std::uint64_t LinkTable::bytes_written() const {
  std::uint64_t sum = bytes_written_;
  for (const PeerLinks& peer : peers_)
    for (const auto& link : peer.links) sum += link->bytes_written();
  return sum;
}

}  // namespace paceline
