#include "core/tcp/tcp.h"

#include <linux/sockios.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <stdexcept>
#include <system_error>

namespace paceline {
namespace {

constexpr int kBacklog = 1024;
constexpr double kFarewell_s = 1.0;  // for the last bytes to reach peers

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

TcpTransport::TcpTransport(TcpOptions options)
    : options_(std::move(options)), key_(link_key(options_.secret, options_.session)) {
  if (options_.rank < 0 || options_.rank >= options_.size)
    throw std::invalid_argument("rank " + std::to_string(options_.rank) + " of " + std::to_string(options_.size));
  rails_ = addresses_of(options_.interfaces);
  if (rails_.empty()) rails_.push_back(address_towards(Endpoint::parse(options_.towards)));
  poller_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  timer_ = Fd(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
  if (!poller_ || !timer_) throw std::system_error(errno, std::generic_category(), "epoll or timerfd");
  register_reader(poller_, timer_);
  listeners_.reserve(rails_.size());  // epoll keeps their addresses
  for (const Endpoint& rail : rails_) {
    listeners_.push_back(listen_at(rail, kBacklog));
    register_reader(poller_, listeners_.back());
  }
  peers_ = std::vector<Peer>(static_cast<std::size_t>(options_.size));
}

TcpTransport::~TcpTransport() { close(); }

std::string TcpTransport::endpoints() const {
  std::string text;
  for (const Fd& listener : listeners_) text += (text.empty() ? "" : ",") + local_endpoint(listener).text();
  return text;
}

void TcpTransport::set_peers(const std::vector<std::string>& endpoints_of_ranks) {
  if (endpoints_of_ranks.size() != peers_.size())
    throw std::invalid_argument("endpoints of " + std::to_string(endpoints_of_ranks.size()) + " ranks; expected " +
                                std::to_string(peers_.size()));
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    peers_[i].endpoints.clear();
    for (const std::string& text : split(endpoints_of_ranks[i])) peers_[i].endpoints.push_back(Endpoint::parse(text));
  }
}

double TcpTransport::now_s() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string TcpTransport::name_of(int peer) const {
  const auto& endpoints = peers_[static_cast<std::size_t>(peer)].endpoints;
  return "rank " + std::to_string(peer) + (endpoints.empty() ? "" : " (" + endpoints.front().text() + ")");
}

bool TcpTransport::progress() {
  if (is_closed_) return false;
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
      if (link.phase == Link::Phase::ready && (event.events & EPOLLOUT)) {
        after_write(link, link.write_on());
        serve_link(link);
      }
    }
  }
  graveyard_.clear();
  return true;
}

void TcpTransport::read(Link& link) {
  const int rank = link.peer;
  if (link.read(*this) != Link::Result::broken) return;
  // Framing errors and half messages cannot be survived; a clean end waits for the other links' last bytes.
  const std::string why = link.why();
  const bool is_nonsense = why.starts_with("bytes that are not") || why.starts_with("checksum");
  drop(link);
  if (is_nonsense) lose(rank, FailureKind::protocol, why);
  else note_ending(rank, why);
}

void TcpTransport::cancel(Transfer& transfer) {
  if (transfer.state != Transfer::State::pending) return;
  if (inbox_.remove(transfer)) return;
  for (std::size_t rank = 0; rank < peers_.size(); ++rank) {
    Peer& peer = peers_[rank];
    for (auto out = peer.outgoing.begin(); out != peer.outgoing.end(); ++out) {
      if (out->transfer != &transfer) continue;
      const bool has_left = out->phase != Outgoing::Phase::queued;
      if (!has_left) peer.outgoing.erase(out);
      else lose(static_cast<int>(rank), FailureKind::aborted, "a message was cancelled when part of it had left");
      return;
    }
    for (auto& [sequence, message] : peer.incoming) {
      if (message->receive != &transfer) continue;
      message->receive = nullptr;
      message->is_discarded = true;
      for (auto& link : peer.links)
        if (link->incoming == message.get()) link->redirect(nullptr);
      return;
    }
  }
}

void TcpTransport::watch(int rank) {
  Peer& peer = peers_.at(static_cast<std::size_t>(rank));
  if (rank != options_.rank && peer.links.empty() && !peer.failure && !is_closed_) dial_all(rank);
}

bool TcpTransport::is_lost(int peer) const {
  const Peer& p = peers_.at(static_cast<std::size_t>(peer));
  return p.failure && !p.has_said_goodbye;
}

int TcpTransport::num_links(int peer) const {
  return static_cast<int>(peers_.at(static_cast<std::size_t>(peer)).links.size());
}

std::uint64_t TcpTransport::wire_bytes_sent() const {
  std::uint64_t sum = wire_bytes_;
  for (const Peer& peer : peers_)
    for (const auto& link : peer.links) sum += link->bytes_written();
  return sum;
}

// The end of the stream counts as one unsent byte; a peer that reset the connection acknowledges nothing any more.
// Closing a socket with unread input resets the connection, and a reset discards what is still on its way out.
void TcpTransport::wait_for_delivery() {
  const double end = now_s() + kFarewell_s;
  for (const auto& link : graveyard_) {
    for (int unsent = 1; unsent > 0 && now_s() < end;) {
      if (!is_open(link->socket()) || ::ioctl(link->descriptor(), SIOCOUTQ, &unsent) != 0 || unsent <= 1) break;
      std::array<std::byte, 4096> ignored;
      if (::recv(link->descriptor(), ignored.data(), ignored.size(), 0) <= 0) ::usleep(200);
    }
  }
}

void TcpTransport::close() {
  if (is_closed_) return;
  FrameHeader goodbye;
  goodbye.kind = FrameKind::goodbye;
  for (std::size_t rank = 0; rank < peers_.size(); ++rank) {
    for (auto& link : peers_[rank].links)
      if (!link->is_writing()) (void)link->write(goodbye, nullptr, nullptr);
    lose(static_cast<int>(rank), FailureKind::aborted, "the transport was closed");
  }
  for (Transfer* transfer : inbox_.take_receives_if([](const Transfer&) { return true; }))
    fail(*transfer, FailureKind::aborted, -1, "the transport was closed");
  is_closed_ = true;
  wait_for_delivery();
  guests_.clear();
  graveyard_.clear();
  listeners_.clear();
}

}  // namespace paceline
