// One per process: orders and drives the operations of all groups.
//
// The driver is the thread that holds the engine's lock. A thread that waits for an operation drives, for all
// groups; while none waits, a helper thread sleeps on the process's doorbell, which peers ring when they
// publish something. So a submit costs no system call, and an operation that is waited for at once never
// changes threads.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core/base/fork_guard.h"
#include "core/engine/completions.h"
#include "core/engine/group.h"
#include "core/engine/transport.h"
#include "core/engine/wait_strategy.h"

namespace paceline {

class Engine {
 public:
  // `host` outlives the engine.
  explicit Engine(Host& host) : host_(host), bell_(host.doorbell()), waiting_(host) {}
  ~Engine() { stop(); }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  enum class Return {
    soon,      // after driving for a few microseconds: most small operations are done then
    when_done  // runs the operation in the caller's thread, so that the helper is not woken
  };
  // Starts an operation. The pointers of `request` must stay valid until it is done. `announced` is the
  // sequence number under which all_reduce_at_once() has announced it already, or 0. Throws Failed if the
  // group has failed.
  OperationPointer submit(Group& group, Request request, Nanoseconds timeout, std::uint64_t announced = 0,
                          Return returns = Return::soon);
  // Tries a small all_reduce without an Operation; what is not done then is to be submitted.
  Group::AtOnce all_reduce_at_once(Group& group, const SmallReduce& call);
  // Drives until `op` is done; false if `timeout` (negative: none) passes first.
  bool wait(Operation& op, Nanoseconds timeout);
  // Whether it is done, after one look.
  bool poll(Operation& op);
  void abort(Group& group, Failure failure);
  // The caller waited long enough for `op`: the group fails with a timeout that names the rank which it waits
  // for.
  void expire(Group& group, Operation& op);
  // Lets the group go: at once, or when its peers have left it.
  void close(std::unique_ptr<Group> group);
  std::size_t num_closing_groups();

  // From now on the driver serves `transport`.
  void add(std::shared_ptr<Transport> transport);
  void remove(const std::shared_ptr<Transport>& transport);
  // Calls `f` as the driver, for everything else that touches groups or transports. Does nothing and returns
  // false in a forked child.
  bool locked(const std::function<void()>& f);
  // Starts the helper thread, so that groups are served while no thread waits.
  void start();
  // Joins the helper; operations in flight fail. Afterwards the engine accepts no more.
  void stop();

  void set_ranks_on_host(int num_ranks) { waiting_.set_ranks_on_host(num_ranks); }
  // Whether ranks of this host share cores.
  bool is_crowded() const { return waiting_.is_crowded(); }

  // Notifies of finished operations.
  Completions& completions() { return completions_; }

  // For groups, under the lock.
  void completed(Operation& op);
  void activate(Group& group);  // it has something to do

 private:
  class Driver;
  bool progress();
  void check();
  bool has_pending() const { return !groups_.empty(); }
  void drive(Operation& op, Nanoseconds until);
  void hand_over();
  void linger(Operation& op);
  void help();
  void sweep();
  std::vector<int> network_fds() const;

  Host& host_;
  Doorbell& bell_;
  ForkGuard fork_;
  WaitStrategy waiting_;
  Completions completions_;
  std::mutex mutex_;
  std::atomic<std::uint32_t> num_claims_{0};  // threads that want the lock while a driver sleeps
  std::atomic<std::uint32_t> epoch_{0};       // changes when an operation completes or the lock is free again
  std::atomic<std::uint32_t> num_blocked_{0};  // threads that sleep on `epoch_`
  std::vector<Group*> groups_;                 // those with pending operations
  std::vector<std::unique_ptr<Group>> closing_;
  std::vector<std::shared_ptr<Transport>> transports_;
  std::thread helper_;
  std::atomic<bool> is_stopping_{false};
  std::atomic<bool> is_dozing_{false};  // the helper: it must be woken to notice work
};

}  // namespace paceline
