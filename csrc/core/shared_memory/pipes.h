// Point-to-point messages: one byte ring per pair of ranks, matching by tag on the receiving side.
#pragma once
#include <cstdint>
#include <deque>
#include <list>
#include <vector>

#include "core/engine/operation.h"

namespace paceline {

class Group;

class Pipes {
 public:
  explicit Pipes(Group& group) : group_(group) {}
  void resize(int num_ranks);

  void enqueue(const OperationPointer& op);
  bool has_pending() const { return num_pending_ > 0; }
  bool progress();
  void check(Nanoseconds now);
  void fail_all(const Failure& failure);

 private:
  struct Header {  // in front of every message; padded to whole words in the ring
    std::int64_t tag;
    std::uint64_t num_bytes;
  };
  struct Message {  // arrived, or arriving, without a receive that wants it
    int source;
    std::int64_t tag;
    std::uint64_t num_bytes;
    std::vector<std::byte> data;
    bool is_complete = false;
    OperationPointer claimed;  // a receive that came while it was arriving
  };
  struct Incoming {  // what is being read from one peer
    bool is_active = false;
    OperationPointer target;  // the receive that it goes to, or
    Message* stored = nullptr;
    std::uint64_t num_bytes = 0;
    std::uint64_t moved = 0;
  };
  struct Outgoing {
    std::deque<OperationPointer> queue;
    bool is_header_sent = false;
    std::uint64_t moved = 0;
  };

  bool push(int peer);
  bool pull(int peer);
  void begin(int peer, const Header& header);
  void end_message(int peer);
  void check_size(const Operation& op, int source, std::uint64_t num_bytes);
  void deliver(Message& message, const OperationPointer& op);
  void complete(const OperationPointer& op, Failure failure = {});

  Group& group_;
  std::vector<Outgoing> outgoing_;
  std::vector<Incoming> incoming_;
  std::list<OperationPointer> receives_;
  std::list<Message> stored_;
  std::size_t num_pending_ = 0;
};

}  // namespace paceline
