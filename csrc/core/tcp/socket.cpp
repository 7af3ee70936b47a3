#include "core/tcp/socket.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <system_error>

namespace paceline {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

void set_option(const Fd& socket, int level, int name, int value) {
  // A missing option costs speed or patience, never correctness.
  (void)::setsockopt(socket.get(), level, name, &value, sizeof value);
}

const sockaddr* raw(const Endpoint& e) { return reinterpret_cast<const sockaddr*>(&e.storage); }

Endpoint copy_of(const sockaddr* address) {
  Endpoint e;
  e.size = address->sa_family == AF_INET ? sizeof(sockaddr_in) : sizeof(sockaddr_in6);
  std::memcpy(&e.storage, address, e.size);
  return e;
}

bool is_usable(const ifaddrs& entry) {
  if (!entry.ifa_addr || !(entry.ifa_flags & IFF_UP)) return false;
  if (entry.ifa_addr->sa_family == AF_INET) return true;
  if (entry.ifa_addr->sa_family != AF_INET6) return false;
  // Link-local addresses need a scope that differs between hosts.
  return !IN6_IS_ADDR_LINKLOCAL(&reinterpret_cast<const sockaddr_in6*>(entry.ifa_addr)->sin6_addr);
}

Endpoint address_of(const std::string& name, const ifaddrs* entries) {
  const bool is_address = name.find(':') != std::string::npos || (!name.empty() && ::isdigit(name[0]));
  const Endpoint wanted = is_address ? Endpoint::parse(name) : Endpoint{};
  const sockaddr* found = nullptr;
  std::string known;
  for (auto* e = entries; e; e = e->ifa_next) {
    if (!is_usable(*e)) continue;
    const Endpoint candidate = copy_of(e->ifa_addr);
    if (is_address ? candidate.has_address_of(wanted) : name == e->ifa_name) {
      if (!found || (found->sa_family == AF_INET6 && e->ifa_addr->sa_family == AF_INET)) found = e->ifa_addr;
    }
    known += std::string(known.empty() ? "" : ", ") + e->ifa_name + " " + candidate.text();
  }
  if (!found)
    throw std::invalid_argument("no interface or address '" + name + "' is up on this host; there are " +
                                known);
  return copy_of(found);
}

}  // namespace

Fd::~Fd() {
  if (fd_ >= 0) ::close(fd_);
}

Endpoint Endpoint::parse(const std::string& text) {
  std::string host = text, port;
  if (text.starts_with('[')) {
    const auto end = text.find(']');
    if (end == std::string::npos) throw std::invalid_argument("address '" + text + "': no closing bracket");
    host = text.substr(1, end - 1);
    if (end + 1 < text.size()) port = text.substr(end + 2);
  } else if (text.find(':') != std::string::npos && text.find(':') == text.rfind(':')) {
    host = text.substr(0, text.find(':'));
    port = text.substr(text.find(':') + 1);
  }
  addrinfo hints{}, *found = nullptr;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  if (::getaddrinfo(host.c_str(), port.empty() ? nullptr : port.c_str(), &hints, &found) != 0)
    throw std::invalid_argument("'" + text + "' is not a numeric address");
  const Endpoint endpoint = copy_of(found->ai_addr);
  ::freeaddrinfo(found);
  return endpoint;
}

std::string Endpoint::host() const {
  char host[INET6_ADDRSTRLEN] = "?";
  if (family() == AF_INET)
    ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in&>(storage).sin_addr, host, sizeof host);
  else if (family() == AF_INET6)
    ::inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6&>(storage).sin6_addr, host, sizeof host);
  return host;
}

std::string Endpoint::text() const {
  return (family() == AF_INET6 ? "[" + host() + "]" : host()) + ":" + std::to_string(port());
}

std::uint16_t Endpoint::port() const {
  return ntohs(family() == AF_INET ? reinterpret_cast<const sockaddr_in&>(storage).sin_port
                                   : reinterpret_cast<const sockaddr_in6&>(storage).sin6_port);
}

void Endpoint::set_port(std::uint16_t port) {
  if (family() == AF_INET) reinterpret_cast<sockaddr_in&>(storage).sin_port = htons(port);
  else reinterpret_cast<sockaddr_in6&>(storage).sin6_port = htons(port);
}

bool Endpoint::is_loopback() const {
  if (family() == AF_INET)
    return reinterpret_cast<const unsigned char*>(
               &reinterpret_cast<const sockaddr_in&>(storage).sin_addr)[0] == 127;
  return IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6&>(storage).sin6_addr);
}

bool Endpoint::has_address_of(const Endpoint& other) const {
  Endpoint a = *this, b = other;
  a.set_port(0);
  b.set_port(0);
  return family() == other.family() && a.text() == b.text();
}

Endpoint address_towards(const Endpoint& peer) {
  Endpoint target = peer;
  if (target.port() == 0) target.set_port(9);  // the discard service; nothing is sent
  const Fd probe(::socket(target.family(), SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!probe || ::connect(probe.get(), raw(target), target.size) != 0)
    throw std::runtime_error("no route to " + target.text() + ": " + std::strerror(errno));
  Endpoint local = local_endpoint(probe);
  local.set_port(0);
  return local;
}

std::vector<Endpoint> addresses_of(const std::string& wanted) {
  ifaddrs* entries = nullptr;
  if (::getifaddrs(&entries) != 0) fail("getifaddrs");
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owner(entries, &::freeifaddrs);
  std::vector<Endpoint> found;
  for (std::size_t at = 0; at <= wanted.size();) {
    const std::size_t comma = std::min(wanted.find(',', at), wanted.size());
    if (comma > at) found.push_back(address_of(wanted.substr(at, comma - at), entries));
    at = comma + 1;
  }
  return found;
}

Fd listen_at(const Endpoint& address, int backlog) {
  Fd socket(::socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket) fail("socket");
  if (::bind(socket.get(), raw(address), address.size) != 0) fail("bind to " + address.text());
  if (::listen(socket.get(), backlog) != 0) fail("listen at " + address.text());
  return socket;
}

Endpoint local_endpoint(const Fd& socket) {
  Endpoint e;
  e.size = sizeof e.storage;
  if (::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&e.storage), &e.size) != 0) fail("getsockname");
  return e;
}

Fd dial(const Endpoint& peer, const Endpoint* source) {
  Fd socket(::socket(peer.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket) fail("socket");
  if (source && source->family() == peer.family()) {
    set_option(socket, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
    if (::bind(socket.get(), raw(*source), source->size) != 0) fail("bind to " + source->text());
  }
  if (::connect(socket.get(), raw(peer), peer.size) != 0 && errno != EINPROGRESS)
    fail("connect to " + peer.text());
  return socket;
}

int socket_error(const Fd& socket) {
  int error = 0;
  socklen_t size = sizeof error;
  return ::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size) == 0 ? error : errno;
}

bool is_open(const Fd& socket) {
  tcp_info info{};
  socklen_t size = sizeof info;
  return ::getsockopt(socket.get(), IPPROTO_TCP, TCP_INFO, &info, &size) == 0 && info.tcpi_state != TCP_CLOSE;
}

void configure_link(const Fd& socket, const LinkOptions& options) {
  set_option(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  if (options.buffer_bytes > 0) {
    set_option(socket, SOL_SOCKET, SO_SNDBUF, options.buffer_bytes);
    set_option(socket, SOL_SOCKET, SO_RCVBUF, options.buffer_bytes);
  }
  Endpoint remote;
  remote.size = sizeof remote.storage;
  const bool is_connected =
      ::getpeername(socket.get(), reinterpret_cast<sockaddr*>(&remote.storage), &remote.size) == 0;
  const bool is_within_host = is_connected && local_endpoint(socket).has_address_of(remote);
  if (options.unsent_bytes > 0 && !is_within_host)
    set_option(socket, IPPROTO_TCP, TCP_NOTSENT_LOWAT, options.unsent_bytes);
  const int dead_after_s = static_cast<int>(options.dead_after / second_ns);
  set_option(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, dead_after_s * 1000);
  set_option(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(socket, IPPROTO_TCP, TCP_KEEPIDLE, std::max(1, dead_after_s / 3));
  set_option(socket, IPPROTO_TCP, TCP_KEEPINTVL, std::max(1, dead_after_s / 6));
  set_option(socket, IPPROTO_TCP, TCP_KEEPCNT, 4);
}

}  // namespace paceline
