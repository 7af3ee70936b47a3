// P ranks that exchange bytes over a transport. A collective runs directly (direct.h), or by a lowered
// program (plan.h) if its request has one.
#pragma once
#include <cstdint>
#include <list>
#include <memory>
#include <vector>

#include "core/base/blocks.h"
#include "core/engine/group.h"
#include "core/network/blame_chain.h"
#include "core/network/direct.h"
#include "core/network/plan.h"

namespace paceline {

class NetworkGroup final : public Group {
 public:
  // `world_ranks[r]` is the transport's number of rank r; `id` is the same on all members and not used by
  // another group of the transport.
  NetworkGroup(Engine& engine, std::shared_ptr<Transport> transport, std::uint32_t id, int rank,
               std::vector<int> world_ranks);
  ~NetworkGroup() override;

  // Listens for farewells; connects to all peers, so that a death is noticed wherever it happens.
  void watch();
  void check(Nanoseconds now) override;

  // For the executor.
  Transport& transport() { return *transport_; }
  Blocks& blocks() { return blocks_; }
  int world_rank(int r) const { return ranks_.world_rank(r); }
  Tag collective_tag(const Operation& op, int channel) const;
  // Why a transfer failed, in this group's numbering: what its peer said before it left, or else the
  // transport's failure.
  Failure explain(const Transfer& transfer) const;
  // The failure of the running operation of `group` if a member gave up, or is gone and nothing moves any
  // more. `group` is this one, or a larger one of the same ranks.
  Failure peer_failure(Group& group) const;
  // A larger group of the same ranks, of which this one is part, lets this object answer and judge for both.
  BlameChain& blame_chain() { return blame_chain_; }

 private:
  struct PendingMessage {
    OperationPointer op;
    Transfer transfer;
  };
  // Why a member gave up, as it tells the others: without it they would only see its connections close.
  struct Farewell {
    struct Words {
      std::uint32_t kind = 0;  // a FailureKind
      std::uint32_t culprit_plus_one = 0;
    };
    Transfer transfer;
    Words words;
  };
  Task start(Operation& op) override;
  void failed(const Failure& failure) override;
  Failure received_farewell() const;
  void prepare_farewell(Farewell& f, int r);
  bool has_messages() const override { return !messages_.empty(); }
  void enqueue_message(const OperationPointer& op) override;
  bool progress_messages() override;
  void fail_messages(const Failure& failure) override;

  std::shared_ptr<Transport> transport_;
  GroupTransport ranks_;
  Blocks blocks_;
  BlameChain blame_chain_;
  std::list<PendingMessage> messages_;
  std::list<Farewell> expected_, sent_;
};

// Runs the plan of `op`.
Task execute(NetworkGroup& group, Operation& op);

}  // namespace paceline
