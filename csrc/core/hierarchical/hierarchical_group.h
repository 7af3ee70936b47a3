// Ranks of several hosts, several on each: what stays inside a host goes through shared memory, everything
// else over the network.
#pragma once
#include <vector>

#include "core/network/network_group.h"
#include "core/shared_memory/shared_memory_group.h"

namespace paceline {

class HierarchicalGroup final : public Group {
 public:
  // `hosts[r]` is rank r's host, from 0 in order of first appearance. `local` joins the ranks of this host,
  // `world` all ranks, both in the order of ranks. `stripe` joins the k-th ranks of all hosts in the order of
  // hosts, where k is this rank's place on its host; it is null if a host has no k-th rank. All three outlive
  // this group.
  HierarchicalGroup(Engine& engine, int rank, std::vector<int> hosts, SharedMemoryGroup& local,
                    NetworkGroup& world, NetworkGroup* stripe);
  ~HierarchicalGroup() override;

  void check(Nanoseconds now) override;

  // For the operations. Places are positions within a host.
  int num_hosts() const { return static_cast<int>(members_.size()); }
  int host_of(int r) const { return hosts_[static_cast<std::size_t>(r)]; }
  int host() const { return host_of(rank_); }
  int place_of(int r) const { return places_[static_cast<std::size_t>(r)]; }
  int place() const { return place_of(rank_); }
  const std::vector<int>& members(int h) const { return members_[static_cast<std::size_t>(h)]; }
  // The rank of host h that sends to and receives from rank r, which is of another host.
  int partner(int r, int h) const {
    return members(h)[static_cast<std::size_t>(place_of(r)) % members(h).size()];
  }
  int num_stripes() const { return num_stripes_; }
  SharedMemoryGroup& local() { return local_; }
  NetworkGroup& world() { return world_; }
  NetworkGroup* stripe() { return stripe_; }
  // Starts a part of `whole` on one of the three groups.
  OperationPointer begin(Group& group, const Operation& whole, Request part);
  // Whether the part is done; throws Failed if it failed.
  bool is_over(const OperationPointer& part) const;

 private:
  std::vector<Group*> groups() const;
  int find_awaited() const;  // as Group::awaited_rank, across the groups
  Task start(Operation& op) override;
  void failed(const Failure& failure) override;
  bool has_messages() const override { return false; }
  void enqueue_message(const OperationPointer& op) override;
  bool progress_messages() override { return false; }
  void fail_messages(const Failure&) override {}

  std::vector<int> hosts_, places_;
  std::vector<std::vector<int>> members_;
  int num_stripes_ = 0;
  SharedMemoryGroup& local_;
  NetworkGroup& world_;
  NetworkGroup* stripe_;
};

// The operations; `op` outlives the task.
Task hierarchical_combine(HierarchicalGroup& group, Operation& op);  // all_reduce, reduce
Task hierarchical_reduce_scatter(HierarchicalGroup& group, Operation& op);
Task hierarchical_all_gather(HierarchicalGroup& group, Operation& op);
Task hierarchical_broadcast(HierarchicalGroup& group, Operation& op);
Task hierarchical_barrier(HierarchicalGroup& group, Operation& op);
Task hierarchical_exchange(HierarchicalGroup& group, Operation& op);  // gather, scatter, all_to_all

}  // namespace paceline
