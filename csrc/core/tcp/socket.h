// Sockets and addresses: ownership, options, listening, dialling; IPv4 and IPv6.
#pragma once
#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "core/base/sync.h"

namespace paceline {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// A numeric IP address with a port; port 0 when only the address counts.
struct Endpoint {
  sockaddr_storage storage{};
  socklen_t size = 0;

  // "10.0.0.1", "10.0.0.1:80", "fd00::1", "[fd00::1]:80". Throws std::invalid_argument: names are not looked
  // up.
  static Endpoint parse(const std::string& text);
  std::string text() const;  // with the port
  std::string host() const;  // without
  std::uint16_t port() const;
  void set_port(std::uint16_t port);
  int family() const { return storage.ss_family; }
  bool is_loopback() const;
  bool has_address_of(const Endpoint& other) const;
};

// This host's address that the kernel uses to reach `peer` (a numeric address). Throws std::runtime_error.
Endpoint address_towards(const Endpoint& peer);

// `wanted` is a comma-separated list of interface names and numeric addresses of this host: one rail each.
// An interface gives its first IPv4 address, or else its first global IPv6 address.
// Throws std::invalid_argument that lists what exists.
std::vector<Endpoint> addresses_of(const std::string& wanted);

// A non-blocking listener at `address`; its port is chosen by the kernel if 0. Throws std::system_error.
Fd listen_at(const Endpoint& address, int backlog);
Endpoint local_endpoint(const Fd& socket);

// Starts a non-blocking connection, from `source` (port 0) if its family fits. Writability tells the outcome;
// `socket_error` then gives the errno, 0 for success. Throws std::system_error if it fails at once.
Fd dial(const Endpoint& peer, const Endpoint* source);
int socket_error(const Fd& socket);
bool is_open(const Fd& socket);  // not reset, and at least one direction not closed

struct LinkOptions {
  int buffer_bytes = 0;  // 0: the kernel tunes it
  // Between hosts, a link is writable only while fewer bytes wait in the kernel, so that urgent messages
  // overtake. Within a host nothing waits there, and the limit would cost wake-ups.
  int unsent_bytes = 1 << 20;
  // Data that stays unacknowledged, or a host that stays silent, for this time breaks the connection.
  Nanoseconds dead_after = 30 * second_ns;
};
// Sets the options of a connected socket.
void configure_link(const Fd& socket, const LinkOptions& options);

}  // namespace paceline
