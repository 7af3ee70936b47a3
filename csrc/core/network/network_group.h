// P ranks of several hosts: collectives are lowered programs whose messages travel over a transport.
#pragma once
#include <cstdint>
#include <list>
#include <memory>
#include <vector>

#include "core/base/blocks.h"
#include "core/network/direct.h"
#include "core/network/blame_chain.h"
#include "core/network/plan.h"
#include "core/engine/group.h"
#include "core/network/transport.h"

namespace paceline {

class NetworkGroup final : public Session {
 public:
  // `world_ranks[r]` is the transport's number of rank r; `id` is the same on all members and not used by another
  // group of the transport.
  NetworkGroup(Engine& engine, std::shared_ptr<Transport> transport, std::uint32_t id, int rank,
               std::vector<int> world_ranks);
  ~NetworkGroup() override;

  // Listens for farewells; connects to everybody, so that a death is noticed wherever it happens.
  void watch();
  void check(Nanoseconds now) override;

  // For the executor.
  Transport& transport() { return *transport_; }
  Blocks& blocks() { return blocks_; }
  int world_rank(int r) const { return world_ranks_[static_cast<std::size_t>(r)]; }
  Tag collective_tag(const Operation& op, int channel) const;
  // A transport's failure in this group's numbering.
  Failure translate(const Transfer& transfer) const;
  // The same, or what the peer said before it went.
  Failure explain(const Transfer& transfer) const;
  // What ends the running operation of `session`, which is this group or one of the same ranks that it is part of: a
  // member gave up, or is gone and nothing moves any more.
  Failure trouble(Session& session) const;
  // For a group that this one is part of, with the same ranks: it answers for both, and judges by both.
  Inquiry& inquiry() { return inquiry_; }

 private:
  struct Message {
    OperationPointer op;
    Transfer transfer;
  };
  // Why a member gave up, told to the others: without it they would only see its connections close.
  struct Farewell {
    Transfer transfer;
    std::uint32_t words[2] = {0, 0};  // kind, culprit + 1
  };
  Task start(Operation& op) override;
  void failed(const Failure& failure) override;
  Failure heard_farewell() const;
  void exchange_farewell(Farewell& f, int r);
  bool has_messages() const override { return !messages_.empty(); }
  void enqueue_message(const OperationPointer& op) override;
  bool progress_messages() override;
  void fail_messages(const Failure& failure) override;
  int rank_of(int world_rank) const;

  std::shared_ptr<Transport> transport_;
  std::uint32_t id_;
  std::vector<int> world_ranks_;
  Blocks blocks_;
  Network network_;  // as the direct operations see it
  Inquiry inquiry_;
  std::list<Message> messages_;
  std::list<Farewell> expected_, said_;
};

// Runs the plan of `op`; an operation without one goes directly.
Task execute(NetworkGroup& group, Operation& op);

}  // namespace paceline
