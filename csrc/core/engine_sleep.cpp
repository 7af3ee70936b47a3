// How the engine waits: spinning, and sleeping until a bell or the network wakes it.
#include <poll.h>
#include <unistd.h>

#include <algorithm>

#include "core/engine.h"

namespace paceline {
namespace {

constexpr int network_spins = 400;           // a look at the network is a system call
constexpr Nanoseconds short_sleep = 50'000;  // spinning instead would have paid

}  // namespace

// Messages of a fast network come within the time of a few looks; waiting for a slow one must leave the processor
// to others. Which of them this is shows in how long sleeps last.
int Engine::spins() const { return has_network_.load() ? std::min(num_spins_, network_spins_) : num_spins_; }

void Engine::learn(Nanoseconds slept) {
  if (slept < short_sleep) network_spins_ = std::min(network_spins_ * 2, network_spins);
  else network_spins_ = std::max(network_spins_ / 2, 2);
}

void Engine::wake(Control::Armed listener) {
  arena_.control().wake(listener);
  const std::uint64_t one = 1;
  if (has_network_.load() && ::write(wake_fds_[listener], &one, sizeof one) < 0) return;  // full: it is awake
}

std::vector<int> Engine::network_fds() const {
  std::vector<int> fds;
  for (const auto& t : transports_) fds.push_back(t->event_fd());
  return fds;
}

// Peers on this host ring a bell, which a sleeper that listens to the network does not hear.
Nanoseconds Engine::nap(Nanoseconds longest) const {
  return transports_.empty() || peers_.empty() ? longest : std::min<Nanoseconds>(longest, 100'000);
}

// Until rung, until the network has something (if this thread serves it), or `timeout`.
void Engine::sleep(Control::Armed listener, std::uint32_t heard, Nanoseconds timeout, const std::vector<int>& network) {
  if (!has_network_.load()) return futex_wait(arena_.control().bells[listener], heard, timeout);
  std::vector<pollfd> fds{{wake_fds_[listener], POLLIN, 0}};
  for (const int fd : network) fds.push_back({fd, POLLIN, 0});
  const timespec limit{timeout / second_ns, timeout % second_ns};
  ::ppoll(fds.data(), fds.size(), &limit, nullptr);
  std::uint64_t rung;
  if ((fds[0].revents & POLLIN) && ::read(wake_fds_[listener], &rung, sizeof rung) < 0) return;
}

}  // namespace paceline
