#include "core/engine/engine.h"

#include <pthread.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

#include "core/network/blame_chain.h"

namespace paceline {
namespace {

constexpr std::size_t heavy_bytes = 512 << 10;  // from here on a submit leaves the work to the helper
constexpr int submit_looks = 4000;              // while something moves
constexpr Nanoseconds look_around = 50'000'000; // how often sleepers check deadlines and the life of peers
constexpr Nanoseconds short_nap = 60'000;       // of the helper, when there was work lately
constexpr Nanoseconds long_nap = 500'000;       // it need not be woken from a nap shorter than this

std::atomic<std::uint32_t> num_forks{0};  // between the first process with an engine and this one

Failed unusable(const char* why) { return Failed({FailureKind::aborted, -1, why}); }

}  // namespace

bool Engine::is_forked_child() const { return num_forks.load(std::memory_order_relaxed) != born_after_; }

// Holds the lock; makes a sleeping or spinning driver give way.
class Engine::Driving {
 public:
  explicit Driving(Engine& engine) : engine_(engine) {
    if (!engine_.is_soon_free()) {
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
  if (num_ranks < ranks_on_host_) return;  // a group of some of them
  ranks_on_host_ = num_ranks;
  cpu_set_t cores;
  const bool known = sched_getaffinity(0, sizeof cores, &cores) == 0;
  const bool crowded = known && num_ranks > CPU_COUNT(&cores);
  num_spins_ = crowded ? 1 : 2000;  // whoever is waited for needs the core
  num_yields_ = crowded ? 200 : 50;
  submit_idle_ = crowded ? 40 : 400;  // about as long as the peers of a small operation take
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
  start_helper();
}

Group::Quick Engine::quick(Group& group, const SmallReduce& call) {
  if (is_forked_child() || is_stopping_.load() || !mutex_.try_lock()) return {};
  const Driving lock(*this, std::adopt_lock);
  return is_crowded() ? group.all_reduce_at_once(call, 1, submit_idle_) : group.all_reduce_at_once(call, 200, 0);
}

OperationPointer Engine::submit(Session& group, Request request, Nanoseconds timeout, std::uint64_t announced,
                                Return returns) {
  if (is_forked_child()) throw unusable("this process was forked from a rank: only the rank itself communicates");
  if (is_stopping_.load()) throw unusable("the engine was stopped");
  auto op = std::make_shared<Operation>();
  op->sequence = announced;
  op->is_heavy = request.numel * size_of(request.dtype) >= heavy_bytes;
  op->request = std::move(request);
  op->started = now_ns();
  op->deadline = op->started + timeout;
  {
    const Driving lock(*this);
    if (group.failure()) throw Failed(group.failure());
    activate(group);
    group.enqueue(op);
    if (returns == Return::when_done) drive(*op, INT64_MAX);
    else if (!op->is_heavy) linger(*op);
    leave();
  }
  if (returns == Return::when_done) wait(*op, -1);
  return op;
}

// Takes the lock if it is free or only held for a look.
bool Engine::is_soon_free() {
  for (int i = 0; i < 100; ++i, cpu_pause())
    if (mutex_.try_lock()) return true;
  return false;
}

// Drives for a moment: most small operations are over before anybody could take them over.
void Engine::linger(Operation& op) {
  const int patience = has_network_.load() ? std::min(submit_idle_, spins()) : submit_idle_;
  for (int idle = 0, looks = 0; idle < patience && looks < submit_looks; ++looks) {
    if (op.is_done.load(std::memory_order_relaxed) || num_claims_.load() > 0) return;
    if (progress()) idle = 0;
    else if (++idle < num_spins_) cpu_pause();
    else sched_yield();
  }
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

void Engine::activate(Session& group) {
  if (std::find(groups_.begin(), groups_.end(), &group) == groups_.end()) groups_.push_back(&group);
}

void Engine::completed(Operation& op) {
  op.is_done.store(true);
  completions_.completed(op);
  if (num_blocked_.load() > 0) {
    epoch_.fetch_add(1);
    futex_wake_all(epoch_);
  }
}

// The driver goes: what is still pending is for the helper. It looks by itself soon after there was work, so
// that a caller who waits at once pays for no hand-over.
void Engine::leave() {
  std::erase_if(groups_, [](Session* g) { return !g->has_pending(); });
  if (!has_pending()) return arena_.control().armed.store(Control::nobody);
  start_helper();
  if (is_dozing_.exchange(false)) wake(Control::helper);
}

bool Engine::wait(Operation& op, Nanoseconds timeout) {
  if (op.is_done.load()) return true;
  if (is_forked_child()) throw unusable("this process was forked from a rank: only the rank itself communicates");
  const Nanoseconds until = timeout < 0 ? INT64_MAX : now_ns() + timeout;
  while (!op.is_done.load()) {
    if (is_soon_free()) {
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
  control.core.store(static_cast<std::uint32_t>(sched_getcpu()) + 1, std::memory_order_relaxed);
  const auto is_done = [&] { return op.is_done.load(std::memory_order_relaxed); };
  int idle = 0;
  for (std::uint32_t turn = 1; !is_done(); ++turn) {
    if (turn % 4096 == 0) check();
    if (num_claims_.load() > 0) return;  // somebody has a call to make: it drives next
    const int limit = spins();
    if (progress()) {
      idle = 0;
    } else if (++idle < limit) {
      cpu_pause();
    } else if (idle == limit) {
      leave_core_of_peers();
    } else if (idle < limit + (has_network_.load() ? 1 : num_yields_)) {
      sched_yield();
    } else {
      const std::uint32_t heard = control.bells[Control::waiter].load();
      control.armed.store(Control::waiter);
      if (!progress() && num_claims_.load() == 0) {
        check();
        const Nanoseconds now = now_ns();
        if (now >= until) return;
        if (!is_done()) {
          sleep(Control::waiter, heard, nap(std::min(look_around, until - now)), network_fds());
          learn(now_ns() - now);
        }
      }
      control.armed.store(Control::nobody);
      idle = spins();  // rung or not: look, yield a little, sleep again
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
  {
    const Driving lock(*this);
    if (op.is_done.load()) return;
    op.deadline = 0;
    group.expire_running();
    check();
    leave();
  }
  if (wait(op, Inquiry::patience + second_ns / 2)) return;  // while peers are asked whose fault it is
  const Driving lock(*this);
  if (!op.is_done.load())
    group.fail({FailureKind::timeout, op.waiting_for, group.describe(op) + ": not done in the given time"});
}

void Engine::start_helper() {
  if (!helper_.joinable() && !is_stopping_.load()) helper_ = std::thread([this] { help(); });
}

void Engine::help() {
  Control& control = arena_.control();
  std::atomic<std::uint32_t>& bell = control.bells[Control::helper];
  Nanoseconds pause = short_nap;  // grows while there is nothing to do
  while (!is_stopping_.load()) {
    control.beat.fetch_add(1, std::memory_order_relaxed);
    const std::uint32_t heard = bell.load();
    std::vector<int> network;  // none while somebody else drives
    Nanoseconds rest = pause;
    if (mutex_.try_lock()) {
      const Driving lock(*this, std::adopt_lock);
      network = network_fds();
      for (int idle = 0; has_pending() && idle < 20 && num_claims_.load() == 0 && num_blocked_.load() == 0;)
        if (progress()) idle = 0;
        else ++idle, sched_yield();
      if (has_pending()) {
        control.armed.store(Control::helper);
        if (progress()) continue;
        check();
        rest = nap(look_around);
        pause = short_nap;
      } else {
        progress();  // connections are made even while nothing is to be sent
      }
      is_dozing_.store(rest > long_nap);
    } else if (rest > long_nap) {
      is_dozing_.store(true);
      if (mutex_.try_lock()) {  // the driver left before it could see that
        is_dozing_.store(false);
        const Driving lock(*this, std::adopt_lock);
        continue;
      }
    }
    const bool dozes = rest > long_nap;
    sleep(Control::helper, heard, rest, network);
    const bool was_woken = dozes && !is_dozing_.exchange(false);
    pause = was_woken ? short_nap : std::min(2 * pause, look_around);
  }
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
