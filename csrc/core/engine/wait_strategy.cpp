#include "core/engine/wait_strategy.h"

#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

namespace paceline {
namespace {

constexpr int max_network_spins = 400;            // each look at the network is a system call
constexpr Nanoseconds short_sleep = 50'000;       // so short that spinning instead would have paid
constexpr Nanoseconds settling_time = 2'000'000;  // between two moves to other cores
constexpr Nanoseconds deaf_nap = 100'000;         // of a sleeper that peers' bells do not reach

}  // namespace

WaitStrategy::~WaitStrategy() {
  for (const int fd : wake_fds_)
    if (fd >= 0) ::close(fd);
}

void WaitStrategy::set_ranks_on_host(int num_ranks) {
  if (num_ranks < ranks_on_host_) return;
  ranks_on_host_ = num_ranks;
  cpu_set_t cores;
  const bool known = sched_getaffinity(0, sizeof cores, &cores) == 0;
  const bool crowded = known && num_ranks > CPU_COUNT(&cores);
  num_spins_ = crowded ? 1 : 2000;  // the rank that is waited for needs the core
  num_yields_ = crowded ? 200 : 50;
  submit_looks_ = crowded ? 40 : 400;  // about as long as the peers of a small operation take
}

void WaitStrategy::add_network() {
  if (has_network_.load()) return;
  for (const auto listener : {Doorbell::waiter, Doorbell::helper})
    wake_fds_[listener] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  has_network_.store(true);
}

// Messages of a fast network come within the time of a few looks; a thread that waits for a slow one must
// leave the core to others. How long sleeps last tells which of the two the network is.
int WaitStrategy::spins() const { return has_network() ? std::min(num_spins_, network_spins_) : num_spins_; }

void WaitStrategy::learn(Nanoseconds slept) {
  if (slept < short_sleep) network_spins_ = std::min(network_spins_ * 2, max_network_spins);
  else network_spins_ = std::max(network_spins_ / 2, 2);
}

// Two ranks that take turns on one core never look busy enough for the scheduler to separate them while other
// work keeps the other cores busy; an operation of a microsecond then takes a hundred. So a rank that waits
// for a peer which was last seen on its own core moves elsewhere.
void WaitStrategy::leave_core_of_peers() {
  const int here = sched_getcpu();
  const Nanoseconds now = now_ns();
  if (is_crowded() || here < 0 || now - moved_ < settling_time) return;
  cpu_set_t allowed;
  if (!host_.is_peer_on(here) || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  moved_ = now;
  cpu_set_t elsewhere = allowed;
  CPU_CLR(here, &elsewhere);
  if (CPU_COUNT(&elsewhere) == 0) return;
  sched_setaffinity(0, sizeof elsewhere, &elsewhere);
  sched_setaffinity(0, sizeof allowed, &allowed);
}

void WaitStrategy::wake(Doorbell::Listener listener) {
  bell_.wake(listener);
  const std::uint64_t one = 1;
  if (has_network() && ::write(wake_fds_[listener], &one, sizeof one) < 0) return;  // full: it is awake
}

// Peers on this host ring a bell, which a sleeper that polls descriptors does not hear.
Nanoseconds WaitStrategy::nap(Nanoseconds longest, bool serves_network) const {
  return serves_network && host_.has_peers() ? std::min(longest, deaf_nap) : longest;
}

void WaitStrategy::sleep(Doorbell::Listener listener, std::uint32_t heard, Nanoseconds timeout,
                         const std::vector<int>& descriptors) {
  if (!has_network()) return futex_wait(bell_.bells[listener], heard, timeout);
  std::vector<pollfd> fds{{wake_fds_[listener], POLLIN, 0}};
  for (const int fd : descriptors) fds.push_back({fd, POLLIN, 0});
  const timespec limit{timeout / second_ns, timeout % second_ns};
  ::ppoll(fds.data(), fds.size(), &limit, nullptr);
  std::uint64_t rung;
  if ((fds[0].revents & POLLIN) && ::read(wake_fds_[listener], &rung, sizeof rung) < 0) return;
}

}  // namespace paceline
