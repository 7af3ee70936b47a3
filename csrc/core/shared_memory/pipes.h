// Point-to-point messages: one byte ring per pair of ranks, matching by tag on the receiving side.
#pragma once
#include <cstdint>
#include <deque>
#include <list>
#include <vector>

#include "core/engine/operation.h"

namespace paceline {

class SharedMemoryGroup;

class Pipes {
 public:
  explicit Pipes(SharedMemoryGroup& group) : group_(group) {}
  void resize(int num_ranks);

  void enqueue(const OperationPointer& op);
  bool has_pending() const { return num_pending_ > 0; }
  bool progress();
  void check(Nanoseconds now);
  void fail_all(const Failure& failure);

 private:
  struct MessageHeader {  // in front of every message; padded to whole words in the ring
    std::int64_t tag;
    std::uint64_t num_bytes;
  };
  struct StoredMessage {  // arrived, or is arriving, before a receive for it was called
    int source;
    std::int64_t tag;
    std::uint64_t num_bytes;
    std::vector<std::byte> data;
    bool is_complete = false;
    OperationPointer claimed;  // a receive that came while it was arriving
  };
  struct IncomingStream {  // what is being read from one peer
    bool is_active = false;
    OperationPointer target;          // the receive that it belongs to, or
    StoredMessage* stored = nullptr;  // where it is kept until there is one
    std::uint64_t num_bytes = 0;
    std::uint64_t moved = 0;
  };
  struct OutgoingStream {
    std::deque<OperationPointer> queue;
    bool is_header_sent = false;
    std::uint64_t moved = 0;
  };

  bool push(int peer);
  bool pull(int peer);
  void begin(int peer, const MessageHeader& header);
  void end_message(int peer);
  void check_size(const Operation& op, int source, std::uint64_t num_bytes);
  void deliver(StoredMessage& message, const OperationPointer& op);
  void complete(const OperationPointer& op, Failure failure = {});

  SharedMemoryGroup& group_;
  std::vector<OutgoingStream> outgoing_;
  std::vector<IncomingStream> incoming_;
  std::list<OperationPointer> receives_;
  std::list<StoredMessage> stored_;
  std::size_t num_pending_ = 0;
};

}  // namespace paceline
