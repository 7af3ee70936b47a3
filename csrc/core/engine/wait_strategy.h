// How a thread of the engine waits: it spins, yields, and at last sleeps until a doorbell or the network
// wakes it.
#pragma once
#include <atomic>
#include <vector>

#include "core/engine/host.h"

namespace paceline {

class WaitStrategy {
 public:
  explicit WaitStrategy(Host& host) : host_(host), bell_(host.doorbell()) {}
  ~WaitStrategy();
  WaitStrategy(const WaitStrategy&) = delete;
  WaitStrategy& operator=(const WaitStrategy&) = delete;

  // Spinning only pays while every rank of the host has a core of its own. Smaller numbers change nothing:
  // they are of groups of some of the ranks.
  void set_ranks_on_host(int num_ranks);
  bool is_crowded() const { return num_spins_ <= 1; }
  // From now on sleepers also listen to the network.
  void add_network();
  bool has_network() const { return has_network_.load(); }

  // Looks for work before a waiting thread yields its core. Fewer while the network is slow.
  int spins() const;
  // Looks without a system call between them.
  int local_spins() const { return num_spins_; }
  int yields() const { return has_network() ? 1 : num_yields_; }
  // Looks for the peers of an operation that was just submitted.
  int submit_looks() const { return submit_looks_; }
  // Adapts spins() to how long a sleep lasted.
  void learn(Nanoseconds slept);
  void leave_core_of_peers();

  // How long a sleeper may sleep if nothing else limits it to less than `longest`.
  Nanoseconds nap(Nanoseconds longest, bool serves_network) const;
  // Sleeps until `listener` is rung after `heard` was read from its bell, until one of `descriptors` is
  // readable, or for `timeout`.
  void sleep(Doorbell::Listener listener, std::uint32_t heard, Nanoseconds timeout,
             const std::vector<int>& descriptors);
  void wake(Doorbell::Listener listener);

 private:
  Host& host_;
  Doorbell& bell_;
  std::atomic<bool> has_network_{false};
  int wake_fds_[3] = {-1, -1,
                      -1};  // by listener: eventfds that take the place of bells once there is a network
  int ranks_on_host_ = 1;
  int num_spins_ = 2000;
  int num_yields_ = 50;
  int submit_looks_ = 400;
  int network_spins_ = 400;
  Nanoseconds moved_ = 0;  // when this process last left a core
};

}  // namespace paceline
