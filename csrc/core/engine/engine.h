// One per process: orders and drives the operations of all groups.
//
// Whoever has time drives: the thread that waits for an operation polls for all groups; while nobody waits, a helper
// thread sleeps on the process's doorbell, which peers ring when they publish something. So a submit costs no
// system call, and an operation that is waited for at once never changes threads.
#pragma once
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "core/shared_memory/arena.h"
#include "core/engine/completions.h"
#include "core/shared_memory/shared_memory_group.h"
#include "core/shared_memory/handover.h"
#include "core/engine/operation.h"
#include "core/network/transport.h"

namespace paceline {

class Engine {
 public:
  Engine();
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  Arena& arena() { return arena_; }
  std::shared_ptr<Peer> peer(int pid, int control_fd);

  // Starts an operation and spins for it a few microseconds. The pointers of `request` must stay valid until the
  // operation is done. Throws Failed if the group has failed before.
  // `announced`: the sequence number under which quick() has announced it already, or 0.
  // Who would wait at once anyhow has it returned when it is done: that spares the helper from being woken.
  enum class Return { soon, when_done };
  OperationPointer submit(Session& group, Request request, Nanoseconds timeout, std::uint64_t announced = 0,
                          Return returns = Return::soon);
  // Tries a small all_reduce without all that; what it leaves undone is to be submitted.
  Group::Quick quick(Group& group, const SmallReduce& call);
  // Drives until `op` is done; false if `timeout` (negative: none) passes first.
  bool wait(Operation& op, Nanoseconds timeout);
  // Whether it is done, after one look.
  bool poll(Operation& op);
  void abort(Session& group, Failure failure);
  // The caller waited long enough for `op`: the group fails with a timeout that names whose move is missing.
  void expire(Session& group, Operation& op);
  void connect(Group& group, const std::vector<Address>& addresses);
  void close(std::unique_ptr<Group> group);
  void close(std::unique_ptr<Session> session);  // of any kind that nobody else looks at
  // From now on `transport` is served whenever somebody drives.
  void add(std::shared_ptr<Transport> transport);
  void remove(const std::shared_ptr<Transport>& transport);
  // Calls `f` as the driver, for what touches groups or transports otherwise.
  void locked(const std::function<void()>& f);
  // Joins the helper; operations in flight fail. Afterwards only frees are allowed.
  void stop();

  // Spinning only pays while every rank of the host has a core of its own. Groups of fewer ranks change nothing.
  void set_ranks_on_host(int num_ranks);
  bool is_crowded() const { return num_spins_ <= 1; }
  std::size_t num_closing_groups();
  // True in a child made by fork() after this engine: it shares memory with peers that do not know it, so it must not touch anything.
  bool is_forked_child() const;

  // Who wants to be told of the end of operations instead of waiting for them.
  Completions& completions() { return completions_; }
  // For operations that run: how they put data where peers read it.
  Handover& handover() { return handover_; }

  // For groups, under the lock.
  void completed(Operation& op);
  void activate(Session& group);  // it has something to do

 private:
  class Driving;
  bool progress();
  void check();
  bool has_pending() const;
  void drive(Operation& op, Nanoseconds until);
  void leave_core_of_peers();
  void leave();
  bool is_soon_free();
  void linger(Operation& op);
  void help();
  int spins() const;
  void learn(Nanoseconds slept);
  void sweep();
  void start_helper();
  void wake(Control::Armed listener);
  // What a sleeper should listen to; to be asked for under the lock.
  std::vector<int> network_fds() const;
  Nanoseconds nap(Nanoseconds longest) const;
  void sleep(Control::Armed listener, std::uint32_t heard, Nanoseconds timeout, const std::vector<int>& network);

  Arena arena_;
  Completions completions_;
  Handover handover_;
  std::mutex mutex_;
  std::atomic<std::uint32_t> num_claims_{0};   // threads that want the lock while a driver sleeps
  std::atomic<std::uint32_t> epoch_{0};        // moves when an operation completes or the lock is free again
  std::atomic<std::uint32_t> num_blocked_{0};  // threads that sleep on `epoch_`
  std::vector<Session*> groups_;               // those with pending operations
  std::vector<std::unique_ptr<Group>> closing_;
  std::vector<std::shared_ptr<Transport>> transports_;
  std::atomic<bool> has_network_{false};
  int wake_fds_[3] = {-1, -1, -1};             // by listener: eventfds that replace the bells once there is a network
  std::map<std::pair<int, int>, std::weak_ptr<Peer>> peers_;
  std::thread helper_;
  std::atomic<bool> is_stopping_{false};
  std::uint32_t born_after_ = 0;  // forks before this engine was made
  int network_spins_ = 400;
  int ranks_on_host_ = 1;
  int num_spins_ = 2000;
  int num_yields_ = 50;
  int submit_idle_ = 400;
  Nanoseconds moved_ = 0;  // when this process last left a core
  std::atomic<bool> is_dozing_{false};  // the helper: it must be woken to notice work
};

}  // namespace paceline
