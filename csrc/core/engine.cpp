#include "core/engine.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>

namespace paceline {
namespace {

constexpr std::size_t heavy_bytes = 512 << 10;  // from here on a submit leaves the work to the helper
constexpr int submit_spins = 400;               // about as long as the peers of a small operation take
constexpr Nanoseconds look_around = 50'000'000; // how often sleepers check deadlines and the life of peers

std::atomic<bool> forked{false};

Failed unusable(const char* why) { return Failed({FailureKind::aborted, -1, why}); }

}  // namespace

bool Engine::is_forked_child() { return forked.load(std::memory_order_relaxed); }

// Holds the lock; makes a sleeping or spinning driver give way.
class Engine::Driving {
 public:
  explicit Driving(Engine& engine) : engine_(engine) {
    if (!engine_.mutex_.try_lock()) {
      engine_.num_claims_.fetch_add(1);
      engine_.arena_.control().wake(Control::waiter);
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
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  (void)registered;
  Peer::enter(arena_.control_fd(), &arena_);
}

Engine::~Engine() {
  stop();
  Peer::leave(arena_.control_fd());
}

void Engine::stop() {
  if (is_forked_child()) {
    if (helper_.joinable()) helper_.detach();  // it does not exist in this process
    return;
  }
  if (is_stopping_.exchange(true)) return;
  {
    const Driving lock(*this);
    for (Group* g : std::vector<Group*>(groups_)) g->fail({FailureKind::aborted, -1, "the engine was stopped"});
    groups_.clear();
  }
  arena_.control().wake(Control::helper);
  if (helper_.joinable()) helper_.join();
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

OperationPointer Engine::submit(Group& group, Request request, Nanoseconds timeout) {
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
  for (std::size_t i = 0; i < groups_.size();) {
    Group& group = *groups_[i];
    moved |= group.progress();
    if (group.has_pending()) ++i;
    else groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(i));
  }
  return moved;
}

bool Engine::has_pending() const { return !groups_.empty(); }

void Engine::check() {
  const Nanoseconds now = now_ns();
  for (Group* g : std::vector<Group*>(groups_)) g->check(now);
  std::erase_if(groups_, [](Group* g) { return !g->has_pending(); });
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
  std::erase_if(groups_, [](Group* g) { return !g->has_pending(); });
  if (!has_pending()) return control.armed.store(Control::nobody);
  start_helper();
  control.armed.store(Control::helper);
  // Whoever published before it saw the bell armed has not rung.
  bool is_heavy = false;
  for (Group* g : groups_) is_heavy |= g->is_heavy();
  if (is_heavy || progress()) control.wake(Control::helper);
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
      std::atomic<std::uint32_t>& bell = control.bells[Control::waiter];
      const std::uint32_t heard = bell.load();
      control.armed.store(Control::waiter);
      if (!progress() && num_claims_.load() == 0) {
        check();
        const Nanoseconds now = now_ns();
        if (now >= until) return;
        if (!is_done()) futex_wait(bell, heard, std::min(look_around, until - now));
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

void Engine::abort(Group& group, Failure failure) {
  if (is_forked_child()) return;
  const Driving lock(*this);
  group.fail(failure);
}

void Engine::expire(Group& group, Operation& op) {
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
    if (mutex_.try_lock()) {
      const Driving lock(*this, std::adopt_lock);
      for (int idle = 0; has_pending() && idle < 20 && num_claims_.load() == 0 && num_blocked_.load() == 0;)
        if (progress()) idle = 0;
        else ++idle, sched_yield();
      if (has_pending()) {
        control.armed.store(Control::helper);
        if (progress()) continue;
        check();
      }
    }
    futex_wait(bell, heard, look_around);
  }
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
