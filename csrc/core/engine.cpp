#include "core/engine.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

namespace paceline {
namespace {

constexpr std::size_t heavy_bytes = 512 << 10;  // from here on a submit leaves the work to the helper
constexpr int submit_spins = 400;               // about as long as the peers of a small operation take
constexpr Nanoseconds look_around = 50'000'000; // how often sleepers check deadlines and the life of peers

std::atomic<std::uint32_t> num_forks{0};  // between the first process with an engine and this one

Failed unusable(const char* why) { return Failed({FailureKind::aborted, -1, why}); }

}  // namespace

bool Engine::is_forked_child() const { return num_forks.load(std::memory_order_relaxed) != born_after_; }

// Holds the lock; makes a sleeping or spinning driver give way.
class Engine::Driving {
 public:
  explicit Driving(Engine& engine) : engine_(engine) {
    if (!engine_.mutex_.try_lock()) {
      engine_.num_claims_.fetch_add(1);
      engine_.wake(Control::waiter);
      engine_.mutex_.lock();
      engine_.num_claims_.fetch_sub(1);
    }
  }
  Driving(Engine& engine, std::adopt_lock_t) : engine_(engine) {}
  ~Driving() {
    engine_.mutex_.unlock();
    if (engine_.num_blocked_.load() > 0) {
      engine_.epoch_.fetch_add(1);
      futex_wake_all(engine_.epoch_);
    }
  }

 private:
  Engine& engine_;
};

Engine::Engine() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1); });
  (void)registered;
  born_after_ = num_forks.load();
  Peer::enter(arena_.control_fd(), &arena_);
}

Engine::~Engine() {
  stop();
  Peer::leave(arena_.control_fd());
  for (const int fd : wake_fds_)
    if (fd >= 0) ::close(fd);
}

void Engine::stop() {
  if (is_forked_child()) {
    if (helper_.joinable()) helper_.detach();  // it does not exist in this process
    return;
  }
  if (is_stopping_.exchange(true)) return;
  {
    const Driving lock(*this);
    for (Session* g : std::vector<Session*>(groups_)) g->fail({FailureKind::aborted, -1, "the engine was stopped"});
    groups_.clear();
  }
  wake(Control::helper);
  if (helper_.joinable()) helper_.join();
  for (const auto& t : transports_) t->close();
  transports_.clear();
}

void Engine::set_ranks_on_host(int num_ranks) {
  cpu_set_t cores;
  const bool known = sched_getaffinity(0, sizeof cores, &cores) == 0;
  const bool crowded = known && num_ranks > CPU_COUNT(&cores);
  num_spins_ = crowded ? 20 : 2000;
  num_yields_ = crowded ? 200 : 50;
}

std::shared_ptr<Peer> Engine::peer(int pid, int control_fd) {
  std::weak_ptr<Peer>& known = peers_[{pid, control_fd}];
  std::shared_ptr<Peer> found = known.lock();
  if (!found) known = found = std::make_shared<Peer>(pid, control_fd);
  return found;
}

void Engine::connect(Group& group, const std::vector<Address>& addresses) {
  const Driving lock(*this);
  group.connect(addresses);
}

OperationPointer Engine::submit(Session& group, Request request, Nanoseconds timeout) {
  if (is_forked_child()) throw unusable("this process was forked from a rank: only the rank itself communicates");
  if (is_stopping_.load()) throw unusable("the engine was stopped");
  auto op = std::make_shared<Operation>();
  op->is_heavy = request.numel * size_of(request.dtype) >= heavy_bytes;
  op->request = std::move(request);
  op->started = now_ns();
  op->deadline = op->started + timeout;
  const Driving lock(*this);
  if (group.failure()) throw Failed(group.failure());
  if (std::find(groups_.begin(), groups_.end(), &group) == groups_.end()) groups_.push_back(&group);
  group.enqueue(op);
  if (!op->is_heavy)
    for (int i = 0; i < submit_spins && !op->is_done.load(std::memory_order_relaxed) && num_claims_.load() == 0; ++i)
      if (!progress()) {
        if (i < num_spins_) cpu_pause();
        else sched_yield(), i += 50;
      }
  leave();
  return op;
}

bool Engine::progress() {
  bool moved = false;
  for (const auto& t : transports_) moved |= t->progress();
  for (std::size_t i = 0; i < groups_.size();) {
    Session& group = *groups_[i];
    moved |= group.progress();
    if (group.has_pending()) ++i;
    else groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(i));
  }
  return moved;
}

bool Engine::has_pending() const { return !groups_.empty(); }

void Engine::check() {
  const Nanoseconds now = now_ns();
  for (Session* g : std::vector<Session*>(groups_)) g->check(now);
  std::erase_if(groups_, [](Session* g) { return !g->has_pending(); });
}

void Engine::completed(Operation& op) {
  op.is_done.store(true);
  if (num_blocked_.load() > 0) {
    epoch_.fetch_add(1);
    futex_wake_all(epoch_);
  }
}

// The driver goes: what is still pending is for the helper, once a peer rings.
void Engine::leave() {
  Control& control = arena_.control();
  std::erase_if(groups_, [](Session* g) { return !g->has_pending(); });
  if (!has_pending()) return control.armed.store(Control::nobody);
  start_helper();
  control.armed.store(Control::helper);
  // Whoever published before it saw the bell armed has not rung.
  bool is_heavy = false;
  for (Session* g : groups_) is_heavy |= g->is_heavy();
  if (is_heavy || has_network_.load() || progress()) wake(Control::helper);
}

bool Engine::wait(Operation& op, Nanoseconds timeout) {
  if (op.is_done.load()) return true;
  if (is_forked_child()) throw unusable("this process was forked from a rank: only the rank itself communicates");
  const Nanoseconds until = timeout < 0 ? INT64_MAX : now_ns() + timeout;
  while (!op.is_done.load()) {
    if (mutex_.try_lock()) {
      const Driving lock(*this, std::adopt_lock);
      drive(op, until);
      leave();
    } else {
      const std::uint32_t epoch = epoch_.load();
      num_blocked_.fetch_add(1);
      if (!op.is_done.load()) futex_wait(epoch_, epoch, 1'000'000);
      num_blocked_.fetch_sub(1);
    }
    if (op.is_done.load()) break;
    if (now_ns() >= until) return false;
    sched_yield();
  }
  return true;
}

void Engine::drive(Operation& op, Nanoseconds until) {
  Control& control = arena_.control();
  control.armed.store(Control::nobody);
  const auto is_done = [&] { return op.is_done.load(std::memory_order_relaxed); };
  int idle = 0;
  for (std::uint32_t turn = 1; !is_done(); ++turn) {
    if (turn % 4096 == 0) check();
    if (num_claims_.load() > 0) return;  // somebody has a call to make: it drives next
    if (progress()) {
      idle = 0;
    } else if (++idle < num_spins_) {
      cpu_pause();
    } else if (idle < num_spins_ + num_yields_) {
      sched_yield();
    } else {
      const std::uint32_t heard = control.bells[Control::waiter].load();
      control.armed.store(Control::waiter);
      if (!progress() && num_claims_.load() == 0) {
        check();
        const Nanoseconds now = now_ns();
        if (now >= until) return;
        if (!is_done()) sleep(Control::waiter, heard, nap(std::min(look_around, until - now)), network_fds());
      }
      control.armed.store(Control::nobody);
      idle = num_spins_;  // rung or not: look, yield a little, sleep again
    }
  }
}

bool Engine::poll(Operation& op) {
  if (op.is_done.load() || is_forked_child()) return op.is_done.load();
  if (mutex_.try_lock()) {
    const Driving lock(*this, std::adopt_lock);
    progress();
    check();
    leave();
  }
  return op.is_done.load();
}

void Engine::abort(Session& group, Failure failure) {
  if (is_forked_child()) return;
  const Driving lock(*this);
  group.fail(failure);
}

void Engine::expire(Session& group, Operation& op) {
  const Driving lock(*this);
  if (op.is_done.load()) return;
  op.deadline = 0;
  group.expire_running();
  check();
  if (!op.is_done.load())
    group.fail({FailureKind::timeout, op.waiting_for, group.describe(op) + ": not done in the given time"});
}

void Engine::start_helper() {
  if (!helper_.joinable() && !is_stopping_.load()) helper_ = std::thread([this] { help(); });
}

void Engine::help() {
  Control& control = arena_.control();
  std::atomic<std::uint32_t>& bell = control.bells[Control::helper];
  while (!is_stopping_.load()) {
    const std::uint32_t heard = bell.load();
    std::vector<int> network;  // none while somebody else drives
    Nanoseconds rest = look_around;
    if (mutex_.try_lock()) {
      network = network_fds();
      const Driving lock(*this, std::adopt_lock);
      for (int idle = 0; has_pending() && idle < 20 && num_claims_.load() == 0 && num_blocked_.load() == 0;)
        if (progress()) idle = 0;
        else ++idle, sched_yield();
      if (has_pending()) {
        control.armed.store(Control::helper);
        if (progress()) continue;
        check();
        rest = nap(rest);
      } else {
        progress();  // connections are made even while nothing is to be sent
      }
    }
    sleep(Control::helper, heard, rest, network);
  }
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
  return transports_.empty() || peers_.empty() ? longest : std::min<Nanoseconds>(longest, 1'000'000);
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

void Engine::add(std::shared_ptr<Transport> transport) {
  const Driving lock(*this);
  if (!has_network_.load()) {
    for (const auto listener : {Control::waiter, Control::helper})
      wake_fds_[listener] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    has_network_.store(true);
  }
  transports_.push_back(std::move(transport));
  start_helper();
}

void Engine::remove(const std::shared_ptr<Transport>& transport) {
  if (is_forked_child()) return;
  const Driving lock(*this);
  if (std::erase(transports_, transport) > 0) transport->close();
}

void Engine::locked(const std::function<void()>& f) {
  const Driving lock(*this);
  f();
}

void Engine::close(std::unique_ptr<Session> session) {
  if (is_forked_child()) {
    (void)session.release();
    return;
  }
  const Driving lock(*this);
  std::erase(groups_, session.get());
  session.reset();
}

void Engine::close(std::unique_ptr<Group> group) {
  if (is_forked_child()) {
    (void)group.release();
    return;
  }
  const Driving lock(*this);
  group->leave();
  std::erase(groups_, group.get());
  closing_.push_back(std::move(group));
  sweep();
}

void Engine::sweep() {
  std::erase_if(closing_, [](const std::unique_ptr<Group>& g) { return g->can_free(); });
  for (auto it = peers_.begin(); it != peers_.end();) {
    if (const auto p = it->second.lock()) {
      p->drop_stale();
      ++it;
    } else {
      it = peers_.erase(it);
    }
  }
}

std::size_t Engine::num_closing_groups() {
  if (is_forked_child()) return 0;
  const Driving lock(*this);
  sweep();
  return closing_.size();
}

}  // namespace paceline
