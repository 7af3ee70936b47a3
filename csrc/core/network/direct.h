// Collectives between hosts, over a Transport. Every rank talks to every other directly: the contributions to a part
// meet at the rank that owns it, which combines them in the order of ranks, so shared memory and TCP give the same bits.
//
// all_reduce, small   everybody sends everything to everybody                    1 step,  (P-1)S bytes sent a rank
// all_reduce, large   parts to their owners, results to everybody, in slices     2 steps, 2(P-1)/P S: the ring's bytes
// reduce              as all_reduce; results to the root only
// reduce_scatter      parts to their owners                                      1 step,  (P-1)/P S
// broadcast, large    slices to owners in turn, who pass them on                 2 steps, S from the root
// gathers, scatter, all_to_all, small broadcasts: straight to the receivers      1 step
// barrier             dissemination (Hensgen, Finkel & Manber 1988)              ceil(lg P) steps
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "core/engine/operation.h"
#include "core/base/task.h"
#include "core/network/transport.h"

namespace paceline {

// The ranks of one group as the network sees them.
struct Network {
  Transport* transport = nullptr;
  int rank = 0;
  std::vector<int> world_ranks;   // of the group's ranks
  std::uint64_t space = 0;        // sets this group's tags apart from other groups'; the same on all its ranks
  std::size_t one_step_bytes = 0; // all_reduce up to this size takes the one-step form; the same on all ranks
  bool* did_move = nullptr;       // set by operations that got on while they were polled
  // Why a transfer failed, in the group's numbering.
  std::function<Failure(const Transfer&)> explain;

  int size() const { return static_cast<int>(world_ranks.size()); }
  int world(int r) const { return world_ranks[static_cast<std::size_t>(r)]; }
  int local(int world_rank) const;  // -1 if it is no member
  // Tags of one operation by phase, below 512.
  Tag tag(std::uint64_t sequence, std::uint64_t phase) const;
};

// The default of `one_step_bytes`: where the second step costs less than the bytes it saves, on a fast link.
std::size_t default_one_step_bytes(int size);

// What a rank says about its call in front of its data; peers compare it with their own.
struct CallHeader {
  std::uint32_t kind = 0, dtype = 0, op = 0, root = 0;
  std::uint64_t numel = 0;
  std::uint64_t padding[5] = {};  // keeps the data behind it aligned to a cache line

  static CallHeader of(const Request& request);
  std::string text() const;
  bool operator==(const CallHeader&) const = default;
};
static_assert(sizeof(CallHeader) == 64);

// Transfers of one operation. What is still under way when it ends is taken back.
class Flight {
 public:
  Flight(Network& network, Operation& op, std::size_t max_transfers);
  ~Flight();
  Flight(const Flight&) = delete;
  Flight& operator=(const Flight&) = delete;

  Transfer& send(int peer, std::uint64_t phase, const std::byte* data, std::size_t num_bytes);
  Transfer& receive(int peer, std::uint64_t phase, std::byte* data, std::size_t num_bytes);
  // All done? Notes whom the operation waits for; throws Failed if one has failed.
  bool is_landed();
  // The same of one transfer.
  bool has_landed(Transfer& transfer);

 private:
  Transfer& post(int peer, std::uint64_t phase, std::byte* data, std::size_t num_bytes, bool is_send);

  Network& network_;
  Operation& op_;
  std::vector<Transfer> transfers_;  // never grows beyond its reserve: their addresses are known to the transport
  std::size_t num_landed_ = 0;       // of a prefix
};

// The operations; `op` and `network` outlive the task.
Task combine_directly(Network& network, Operation& op);
Task exchange_directly(Network& network, Operation& op);
Task broadcast_directly(Network& network, Operation& op);
Task barrier_directly(Network& network, Operation& op);
Task run_directly(Network& network, Operation& op);  // whichever fits the request

// Throws Failed(mismatch) unless `peer` made the same call.
void check_call(const Operation& op, int peer, const CallHeader& theirs);

}  // namespace paceline
