// How a rank's TCP transport finds and authenticates its peers.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "core/base/sync.h"
#include "core/tcp/socket.h"

namespace paceline {

struct TcpOptions {
  int rank = 0;
  int size = 1;
  std::vector<std::byte> secret;   // of the job
  std::vector<std::byte> session;  // differs between jobs and restarts that share a secret
  std::string interfaces;  // names or addresses, one rail each; empty: the one that leads to `towards`
  std::string towards = "127.0.0.1";  // a numeric address that every rank can reach, such as the rendezvous
  int links_per_peer = 0;             // per rail; 0: one within a host, else two
  bool checks = false;                // CRC-32C over every frame
  Nanoseconds connect_timeout = 30 * second_ns;
  LinkOptions link;
};

}  // namespace paceline
