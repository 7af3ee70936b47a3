#include "core/engine/engine.h"

#include <sched.h>

#include <algorithm>

namespace paceline {
namespace {

constexpr std::size_t heavy_bytes = 512 << 10;   // from here on a submit leaves the work to the helper
constexpr int max_submit_looks = 4000;           // while something moves
constexpr Nanoseconds look_around = 50'000'000;  // how often sleepers check deadlines and whether peers live
constexpr Nanoseconds short_nap = 60'000;        // of the helper, when there was work lately
constexpr Nanoseconds long_nap = 500'000;        // the helper need not be woken from a nap shorter than this
// How long expire() waits while peers are asked which rank is at fault.
constexpr Nanoseconds blame_time = Respondent::patience + second_ns / 2;

Failed unusable(const char* why) { return Failed({FailureKind::aborted, -1, why}); }
Failed unusable_in_fork() {
  return unusable("this process was forked from a rank: only the rank itself communicates");
}

}  // namespace

// Holds the lock; makes a sleeping or spinning driver give way. A forked child never gets it.
class Engine::Driver {
 public:
  // Waits for the lock.
  explicit Driver(Engine& engine) : Driver(engine, 100) {
    if (engine_ || engine.fork_.is_child()) return;
    engine.num_claims_.fetch_add(1);
    engine.waiting_.wake(Doorbell::waiter);
    engine.mutex_.lock();
    engine.num_claims_.fetch_sub(1);
    engine_ = &engine;
  }
  // Tries to take it: 100 times are enough if another thread only holds it for a look.
  Driver(Engine& engine, int num_tries) {
    if (engine.fork_.is_child()) return;
    for (int i = 0; i < num_tries && !engine_; ++i) {
      if (i > 0) cpu_pause();
      if (engine.mutex_.try_lock()) engine_ = &engine;
    }
  }
  ~Driver() {
    if (!engine_) return;
    engine_->mutex_.unlock();
    if (engine_->num_blocked_.load() > 0) {
      engine_->epoch_.fetch_add(1);
      futex_wake_all(engine_->epoch_);
    }
  }
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;
  explicit operator bool() const { return engine_ != nullptr; }

 private:
  Engine* engine_ = nullptr;
};

void Engine::stop() {
  if (fork_.is_child()) {
    if (helper_.joinable()) helper_.detach();  // it does not exist in this process
    return;
  }
  if (is_stopping_.exchange(true)) return;
  {
    const Driver driver(*this);
    for (Group* g : std::vector<Group*>(groups_))
      g->fail({FailureKind::aborted, -1, "the engine was stopped"});
    groups_.clear();
  }
  waiting_.wake(Doorbell::helper);
  if (helper_.joinable()) helper_.join();
  for (const auto& t : transports_) t->close();
  transports_.clear();
}

Group::AtOnce Engine::all_reduce_at_once(Group& group, const SmallReduce& call) {
  if (is_stopping_.load()) return {};
  const Driver driver(*this, 1);
  if (!driver) return {};
  return is_crowded() ? group.all_reduce_at_once(call, 1, waiting_.submit_looks())
                      : group.all_reduce_at_once(call, 200, 0);
}

OperationPointer Engine::submit(Group& group, Request request, Nanoseconds timeout, std::uint64_t announced,
                                Return returns) {
  if (fork_.is_child()) throw unusable_in_fork();
  if (is_stopping_.load()) throw unusable("the engine was stopped");
  auto op = std::make_shared<Operation>();
  op->sequence = announced;
  op->is_heavy = request.numel * size_of(request.dtype) >= heavy_bytes;
  op->request = std::move(request);
  op->started = now_ns();
  op->deadline = op->started + timeout;
  {
    const Driver driver(*this);
    if (group.failure()) throw Failed(group.failure());
    activate(group);
    group.enqueue(op);
    if (returns == Return::when_done) drive(*op, INT64_MAX);
    else if (!op->is_heavy) linger(*op);
    hand_over();
  }
  if (returns == Return::when_done) wait(*op, -1);
  return op;
}

// Drives for a moment: most small operations are done before another thread could take them over.
void Engine::linger(Operation& op) {
  const int patience =
      waiting_.has_network() ? std::min(waiting_.submit_looks(), waiting_.spins()) : waiting_.submit_looks();
  for (int idle = 0, looks = 0; idle < patience && looks < max_submit_looks; ++looks) {
    if (op.is_done.load(std::memory_order_relaxed) || num_claims_.load() > 0) return;
    if (progress()) idle = 0;
    else if (++idle < waiting_.local_spins()) cpu_pause();
    else sched_yield();
  }
}

bool Engine::progress() {
  bool moved = false;
  for (const auto& t : transports_) moved |= t->progress();
  for (std::size_t i = 0; i < groups_.size();) {
    Group& group = *groups_[i];
    moved |= group.progress();
    if (group.has_pending()) ++i;
    else groups_.erase(groups_.begin() + static_cast<std::ptrdiff_t>(i));
  }
  return moved;
}

void Engine::check() {
  const Nanoseconds now = now_ns();
  for (Group* g : std::vector<Group*>(groups_)) g->check(now);
  std::erase_if(groups_, [](Group* g) { return !g->has_pending(); });
}

void Engine::activate(Group& group) {
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

// What is pending when the driver goes is left to the helper, which looks by itself soon after there was
// work. So a caller that waits at once pays for no hand-over.
void Engine::hand_over() {
  std::erase_if(groups_, [](Group* g) { return !g->has_pending(); });
  if (!has_pending()) return bell_.armed.store(Doorbell::nobody);
  start();
  if (is_dozing_.exchange(false)) waiting_.wake(Doorbell::helper);
}

bool Engine::wait(Operation& op, Nanoseconds timeout) {
  if (op.is_done.load()) return true;
  if (fork_.is_child()) throw unusable_in_fork();
  const Nanoseconds until = timeout < 0 ? INT64_MAX : now_ns() + timeout;
  while (!op.is_done.load()) {
    if (const Driver driver(*this, 100); driver) {
      drive(op, until);
      hand_over();
    } else {
      const std::uint32_t epoch = epoch_.load();
      num_blocked_.fetch_add(1);
      if (!op.is_done.load()) futex_wait(epoch_, epoch, millisecond_ns);
      num_blocked_.fetch_sub(1);
    }
    if (op.is_done.load()) break;
    if (now_ns() >= until) return false;
    sched_yield();
  }
  return true;
}

void Engine::drive(Operation& op, Nanoseconds until) {
  bell_.armed.store(Doorbell::nobody);
  bell_.core.store(static_cast<std::uint32_t>(sched_getcpu()) + 1, std::memory_order_relaxed);
  const auto is_done = [&] { return op.is_done.load(std::memory_order_relaxed); };
  int idle = 0;
  for (std::uint32_t turn = 1; !is_done(); ++turn) {
    if (turn % 4096 == 0) check();
    if (num_claims_.load() > 0) return;  // another thread has a call to make: it drives next
    const int limit = waiting_.spins();
    if (progress()) {
      idle = 0;
    } else if (++idle < limit) {
      cpu_pause();
    } else if (idle == limit) {
      waiting_.leave_core_of_peers();
    } else if (idle < limit + waiting_.yields()) {
      sched_yield();
    } else {
      const std::uint32_t heard = bell_.bells[Doorbell::waiter].load();
      bell_.armed.store(Doorbell::waiter);
      if (!progress() && num_claims_.load() == 0) {
        check();
        const Nanoseconds now = now_ns();
        if (now >= until) return;
        if (!is_done()) {
          const Nanoseconds longest = waiting_.nap(std::min(look_around, until - now), !transports_.empty());
          waiting_.sleep(Doorbell::waiter, heard, longest, network_fds());
          waiting_.learn(now_ns() - now);
        }
      }
      bell_.armed.store(Doorbell::nobody);
      idle = waiting_.spins();  // rung or not: look, yield a little, sleep again
    }
  }
}

bool Engine::poll(Operation& op) {
  if (op.is_done.load()) return true;
  if (const Driver driver(*this, 1); driver) {
    progress();
    check();
    hand_over();
  }
  return op.is_done.load();
}

void Engine::abort(Group& group, Failure failure) {
  if (const Driver driver(*this); driver) group.fail(failure);
}

void Engine::expire(Group& group, Operation& op) {
  {
    const Driver driver(*this);
    if (op.is_done.load()) return;
    op.deadline = 0;
    group.expire_running();
    check();
    hand_over();
  }
  if (wait(op, blame_time)) return;
  const Driver driver(*this);
  if (!op.is_done.load())
    group.fail({FailureKind::timeout, op.waiting_for, group.describe(op) + ": not done in the given time"});
}

void Engine::start() {
  if (!helper_.joinable() && !is_stopping_.load()) helper_ = std::thread([this] { help(); });
}

void Engine::help() {
  std::atomic<std::uint32_t>& bell = bell_.bells[Doorbell::helper];
  Nanoseconds pause = short_nap;  // grows while there is nothing to do
  while (!is_stopping_.load()) {
    bell_.beat.fetch_add(1, std::memory_order_relaxed);
    const std::uint32_t heard = bell.load();
    std::vector<int> network;  // none while another thread drives
    Nanoseconds nap = pause;
    if (const Driver driver(*this, 1); driver) {
      network = network_fds();
      int idle = 0;
      while (has_pending() && idle < 20 && num_claims_.load() == 0 && num_blocked_.load() == 0) {
        if (progress()) {
          idle = 0;
        } else {
          ++idle;
          sched_yield();
        }
      }
      if (has_pending()) {
        bell_.armed.store(Doorbell::helper);
        if (progress()) continue;
        check();
        nap = waiting_.nap(look_around, !transports_.empty());
        pause = short_nap;
      } else {
        progress();  // connections are made even while nothing is to be sent
        if (!closing_.empty()) sweep();
      }
      is_dozing_.store(nap > long_nap);
    } else if (nap > long_nap) {
      is_dozing_.store(true);
      if (const Driver late(*this, 1); late) {  // the driver left before it could see that
        is_dozing_.store(false);
        continue;
      }
    }
    const bool dozes = nap > long_nap;
    waiting_.sleep(Doorbell::helper, heard, nap, network);
    const bool was_woken = dozes && !is_dozing_.exchange(false);
    pause = was_woken ? short_nap : std::min(2 * pause, look_around);
  }
}

std::vector<int> Engine::network_fds() const {
  std::vector<int> fds;
  for (const auto& t : transports_) fds.push_back(t->event_fd());
  return fds;
}

void Engine::add(std::shared_ptr<Transport> transport) {
  const Driver driver(*this);
  if (!driver) throw unusable_in_fork();
  waiting_.add_network();
  transports_.push_back(std::move(transport));
  start();
}

void Engine::remove(const std::shared_ptr<Transport>& transport) {
  if (const Driver driver(*this); driver && std::erase(transports_, transport) > 0) transport->close();
}

bool Engine::locked(const std::function<void()>& f) {
  const Driver driver(*this);
  if (driver) f();
  return static_cast<bool>(driver);
}

void Engine::close(std::unique_ptr<Group> group) {
  const Driver driver(*this);
  if (!driver) {
    (void)group.release();  // its destructor would tell peers that the rank closes it
    return;
  }
  group->leave();
  std::erase(groups_, group.get());
  closing_.push_back(std::move(group));
  sweep();
  if (!closing_.empty()) start();  // the helper lets it go when the last peer has left
}

void Engine::sweep() {
  std::erase_if(closing_, [](const std::unique_ptr<Group>& g) { return g->can_free(); });
  host_.sweep();
}

std::size_t Engine::num_closing_groups() {
  const Driver driver(*this);
  if (!driver) return 0;
  sweep();
  return closing_.size();
}

}  // namespace paceline
