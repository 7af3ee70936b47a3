// What one rank publishes for the other members of a group. Written by its owner only, except `left`; read by all.
// Peers poll it, so everything that changes at different times has its own cache line.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/shared_memory/control.h"

namespace paceline {

// How a rank announces operation number `sequence`: what it called, where its buffers are, and, if they are small,
// the data itself in the same cache line. Slots rotate, so no barrier is needed after an operation.
struct Post {
  std::atomic<std::uint64_t> sequence;
  std::uint32_t what;  // signature of the call: operation, dtype, operator, root
  std::uint32_t mode;  // how the data travels: see combine.cpp and exchange.cpp; from bit 16 on: the first stage
  std::uint64_t numel;
  Location source;
  Location output;
  std::byte payload[8];  // goes on for eager_bytes
};
static_assert(sizeof(Post) == 64);

// Counters of slices within an operation: high bits the operation, low 24 bits the number of slices.
constexpr std::uint64_t mark(std::uint64_t sequence, std::uint64_t slices) { return (sequence << 24) | slices; }

class Outbox {
 public:
  static constexpr int num_posts = 4;
  static constexpr std::size_t eager_bytes = 32 << 10;
  // Up to which size reductions travel with their posts: every rank reads all of them.
  static constexpr std::size_t eager_reduce_bytes(int num_ranks) {
    return 4 * eager_bytes / static_cast<std::size_t>(num_ranks < 2 ? 2 : num_ranks);
  }
  // Reductions up to here travel in the post itself, larger ones in the ring.
  static constexpr std::size_t inline_bytes = 1 << 10;
  // Writing to lines that a peer has read costs several times as much as reading what it wrote. The rings of stages
  // are larger than a core's cache, so that most have left it when they are used again; ranks that combine exchange
  // their places in them at every lap besides (combine.cpp, Group::lane), so that each writes where it has read.
  static constexpr int num_stages = 8;
  static constexpr std::size_t stage_bytes = 256 << 10;
  static constexpr std::size_t ring_bytes = num_stages * stage_bytes;
  static constexpr std::size_t pipe_bytes = 64 << 10;

  Outbox() = default;
  Outbox(std::byte* base, int num_ranks) : base_(base), num_ranks_(num_ranks) {}

  static std::size_t num_bytes(int num_ranks) { return Outbox(nullptr, num_ranks).pipes_offset() +
                                                       static_cast<std::size_t>(num_ranks) * pipe_bytes; }

  using Counter = std::atomic<std::uint64_t>;
  Counter& done() const { return counter(0); }      // last operation finished
  Counter& poison() const { return counter(1); }    // 0, or why this rank gave up: kind << 32 | culprit + 1
  Counter& staged() const { return counter(2); }    // slices copied in
  Counter& reduced() const { return counter(3); }   // slices of the own part reduced
  Counter& consumed() const { return counter(4); }  // slices copied out
  Counter& taken(int peer) const { return counter(5 + peer); }                     // slices read from `peer`
  Counter& piped(int peer) const { return counter(5 + num_ranks_ + peer); }        // bytes put in the pipe to `peer`
  Counter& drained(int peer) const { return counter(5 + 2 * num_ranks_ + peer); }  // bytes read from its pipe
  Counter& left(int peer) const { return counter(5 + 3 * num_ranks_ + peer); }     // set by `peer` when it closes

  Post& post(std::uint64_t sequence) const {
    return *reinterpret_cast<Post*>(base_ + posts_offset() + (sequence % num_posts) * post_stride);
  }
  // Of exchanges, whose senders alone know what they use; and of reductions, where all ranks use the same.
  std::byte* stage(std::uint64_t slice) const {
    return base_ + stages_offset() + ring_bytes + slice % num_stages * stage_bytes;
  }
  std::byte* ring(std::uint64_t offset) const { return base_ + stages_offset() + offset; }
  std::byte* pipe(int peer) const { return base_ + pipes_offset() + static_cast<std::size_t>(peer) * pipe_bytes; }
  std::byte* base() const { return base_; }

 private:
  static constexpr std::size_t post_stride = eager_bytes + 4096;

  Counter& counter(int i) const { return *reinterpret_cast<Counter*>(base_ + static_cast<std::size_t>(i) * 64); }
  std::size_t posts_offset() const {
    return (static_cast<std::size_t>(5 + 4 * num_ranks_) * 64 + 4095) / 4096 * 4096;
  }
  std::size_t stages_offset() const { return posts_offset() + num_posts * post_stride; }
  std::size_t pipes_offset() const { return stages_offset() + 2 * ring_bytes; }

  std::byte* base_ = nullptr;
  int num_ranks_ = 0;
};

}  // namespace paceline
