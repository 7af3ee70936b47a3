// How the engine waits: spinning, and sleeping until a bell or the network wakes it.
#include <poll.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>

#include "core/engine/engine.h"

namespace paceline {
namespace {

constexpr int network_spins = 400;           // a look at the network is a system call
constexpr Nanoseconds short_sleep = 50'000;  // spinning instead would have paid
constexpr Nanoseconds settling = 2'000'000;  // between two moves to other cores

}  // namespace

// Messages of a fast network come within the time of a few looks; waiting for a slow one must leave the processor
// to others. Which of them this is shows in how long sleeps last.
int Engine::spins() const { return has_network_.load() ? std::min(num_spins_, network_spins_) : num_spins_; }

void Engine::learn(Nanoseconds slept) {
  if (slept < short_sleep) network_spins_ = std::min(network_spins_ * 2, network_spins);
  else network_spins_ = std::max(network_spins_ / 2, 2);
}

// Two ranks that take turns on one core never look busy enough to be parted by the scheduler, while other work keeps
// the other cores; an operation of a microsecond then takes a hundred. So whoever waits for a peer that was last
// seen on its own core goes elsewhere.
void Engine::leave_core_of_peers() {
  const int here = sched_getcpu();
  const Nanoseconds now = now_ns();
  if (is_crowded() || here < 0 || now - moved_ < settling) return;
  bool is_shared = false;
  for (const auto& [key, weak] : peers_)
    if (const auto p = weak.lock(); p && p->pid() != getpid()) is_shared |= p->core() == static_cast<std::uint32_t>(here) + 1;
  cpu_set_t allowed;
  if (!is_shared || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  moved_ = now;
  cpu_set_t elsewhere = allowed;
  CPU_CLR(here, &elsewhere);
  if (CPU_COUNT(&elsewhere) == 0) return;
  sched_setaffinity(0, sizeof elsewhere, &elsewhere);
  sched_setaffinity(0, sizeof allowed, &allowed);
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
