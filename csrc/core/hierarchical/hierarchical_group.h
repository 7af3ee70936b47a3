// Ranks of several hosts, several on each: what stays inside a host goes through shared memory, the rest over TCP.
#pragma once
#include <vector>

#include "core/shared_memory/shared_memory_group.h"
#include "core/network/network_group.h"

namespace paceline {

class MixedGroup final : public Session {
 public:
  // `hosts[r]` is rank r's host, from 0 in order of first appearance. `local` joins the ranks of this host in their
  // order, `world` everybody in theirs; `stripe`, if every host has a k-th rank, the k-th ranks of all hosts in
  // order of hosts, where k is this rank's place on its host (else null). They outlive this group.
  MixedGroup(Engine& engine, int rank, std::vector<int> hosts, Group& local, NetworkGroup& world, NetworkGroup* stripe);
  ~MixedGroup() override;

  void check(Nanoseconds now) override;

  // For the operations. Places are positions within a host.
  int num_hosts() const { return static_cast<int>(members_.size()); }
  int host_of(int r) const { return hosts_[static_cast<std::size_t>(r)]; }
  int host() const { return host_of(rank_); }
  int place_of(int r) const { return places_[static_cast<std::size_t>(r)]; }
  int place() const { return place_of(rank_); }
  const std::vector<int>& members(int h) const { return members_[static_cast<std::size_t>(h)]; }
  // The rank of host h that looks after what concerns rank r of another host.
  int partner(int r, int h) const {
    return members(h)[static_cast<std::size_t>(place_of(r)) % members(h).size()];
  }
  int num_stripes() const { return num_stripes_; }
  Group& local() { return local_; }
  NetworkGroup& world() { return world_; }
  NetworkGroup* stripe() { return stripe_; }
  // Starts a part of `whole` on one of the groups.
  OperationPointer begin(Session& group, const Operation& whole, Request part);
  // Whether it is over; throws Failed if it failed.
  bool is_over(const OperationPointer& part) const;

 private:
  std::vector<Session*> groups() const;
  int missing() const;  // the rank that is waited for, as Session::waits_for
  Task start(Operation& op) override;
  void failed(const Failure& failure) override;
  bool has_messages() const override { return false; }
  void enqueue_message(const OperationPointer& op) override;
  bool progress_messages() override { return false; }
  void fail_messages(const Failure&) override {}

  std::vector<int> hosts_, places_;
  std::vector<std::vector<int>> members_;
  int num_stripes_ = 0;
  Group& local_;
  NetworkGroup& world_;
  NetworkGroup* stripe_;
};

// The operations; `op` outlives the task.
Task combine_mixed(MixedGroup& group, Operation& op);         // all_reduce, reduce
Task reduce_scatter_mixed(MixedGroup& group, Operation& op);
Task all_gather_mixed(MixedGroup& group, Operation& op);
Task broadcast_mixed(MixedGroup& group, Operation& op);
Task barrier_mixed(MixedGroup& group, Operation& op);
Task exchange_mixed(MixedGroup& group, Operation& op);        // gather, scatter, all_to_all

}  // namespace paceline
