// Collectives between hosts, over a Transport. Every rank talks to every other directly: the contributions to
// a part meet at the rank that owns it, which combines them in the order of ranks. So shared memory and TCP
// give the same bits. Of P ranks and S bytes:
//
// all_reduce, small   all ranks send all their data to all others               1 step,  (P-1)S bytes a rank
// all_reduce, large   parts to their owners, results to all ranks, in slices    2 steps, 2(P-1)/P S
// reduce              as all_reduce; results to the root only
// reduce_scatter      parts to their owners                                     1 step,  (P-1)/P S
// broadcast, large    slices to owners in turn, which pass them on              2 steps, S from the root
// gathers, scatter, all_to_all, small broadcasts: straight to the receivers     1 step
// barrier             dissemination (Hensgen, Finkel & Manber 1988)             ceil(lg P) steps
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/base/task.h"
#include "core/engine/call.h"
#include "core/engine/transport.h"

namespace paceline {

// The ranks of one group on a transport.
struct GroupTransport {
  Transport* transport = nullptr;
  int rank = 0;
  std::vector<int> world_ranks;  // the transport's number of each of the group's ranks
  std::uint32_t space = 0;  // separates this group's tags from other groups' tags; the same on all its ranks
  std::size_t one_step_bytes =
      0;                     // all_reduce up to this size takes the one-step form; the same on all ranks
  bool* did_move = nullptr;  // set when a poll made progress
  // Why a transfer failed, in the group's numbering.
  std::function<Failure(const Transfer&)> explain;

  int size() const { return static_cast<int>(world_ranks.size()); }
  int world_rank(int r) const { return world_ranks[static_cast<std::size_t>(r)]; }
  int rank_of(int world_rank) const;  // -1 if it is not a member
  // Tags of one operation by phase, below 512.
  Tag tag(std::uint64_t sequence, std::uint64_t phase) const;
};

// The default of `one_step_bytes`: where the second step costs less than the bytes it saves, on a fast link.
std::size_t default_one_step_bytes(int size);

// The call that a rank sends in front of its data; peers compare it with their own.
struct CallHeader {
  CollectiveCall call;
  std::uint64_t padding[5] = {};  // keeps the data behind it aligned to a cache line

  static CallHeader of(const Request& request) { return {CollectiveCall::of(request)}; }
};
static_assert(sizeof(CallHeader) == 64);

// The transfers of one operation. Those still pending when it ends are cancelled.
class Flight {
 public:
  Flight(GroupTransport& ranks, Operation& op, std::size_t max_transfers);
  ~Flight();
  Flight(const Flight&) = delete;
  Flight& operator=(const Flight&) = delete;

  Transfer& send(int peer, std::uint64_t phase, const std::byte* data, std::size_t num_bytes);
  Transfer& receive(int peer, std::uint64_t phase, std::byte* data, std::size_t num_bytes);
  // Whether all are done. Notes which rank the operation waits for; throws Failed if a transfer has failed.
  bool is_landed();
  // The same of one transfer.
  bool has_landed(Transfer& transfer);

 private:
  Transfer& post(int peer, std::uint64_t phase, std::byte* data, std::size_t num_bytes, bool is_send);

  GroupTransport& ranks_;
  Operation& op_;
  std::vector<Transfer>
      transfers_;               // never grows beyond its reserve: their addresses are known to the transport
  std::size_t num_landed_ = 0;  // transfers at the front that are done
};

// The operations; `op` and `ranks` outlive the task.
Task combine_directly(GroupTransport& ranks, Operation& op);
Task exchange_directly(GroupTransport& ranks, Operation& op);
Task broadcast_directly(GroupTransport& ranks, Operation& op);
Task barrier_directly(GroupTransport& ranks, Operation& op);
Task run_directly(GroupTransport& ranks, Operation& op);  // the one that fits the request

// Throws Failed(mismatch) unless `peer` made the same call.
void check_call(const Operation& op, int peer, const CallHeader& theirs);

}  // namespace paceline
