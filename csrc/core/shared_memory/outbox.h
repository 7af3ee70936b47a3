// What one rank publishes for the other members of a group. Only its owner writes it, except `left`; all
// members read it. Peers poll it, so things that change at different times have cache lines of their own.
#pragma once
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/engine/call.h"
#include "core/engine/operation.h"
#include "core/shared_memory/control.h"

namespace paceline {

// How the data of an operation travels between ranks that share memory; see combine.cpp and exchange.cpp.
enum class Protocol : std::uint32_t { eager, zero_copy, staged };

// What all ranks must agree on besides the number of elements. Kinds, dtypes and operators fit 4 bits.
struct PackedCall {
  std::uint32_t kind : 4, dtype : 4, op : 4, root : 20;

  static PackedCall of(OperationKind kind, DType dtype, ReduceOp op, int root) {
    return {static_cast<std::uint32_t>(kind) & 15u, static_cast<std::uint32_t>(dtype) & 15u,
            is_reduction(kind) ? static_cast<std::uint32_t>(op) & 15u : 0u,
            static_cast<std::uint32_t>(root) & 0xfffffu};
  }
  static PackedCall of(const Request& r) { return of(r.kind, r.dtype, r.op, r.root); }
  CollectiveCall unpacked(std::uint64_t numel) const { return {kind, dtype, op, root, numel}; }
  bool operator==(const PackedCall& other) const {
    return std::bit_cast<std::uint32_t>(*this) == std::bit_cast<std::uint32_t>(other);
  }
};

// How the sender of a post sends its data.
struct Routing {
  Protocol protocol : 3;
  std::uint32_t is_same_for_all : 1;  // of an exchange: all receivers get the same range
  std::uint32_t unused : 12;
  std::uint32_t first_stage : 16;  // of an exchange: the stage that holds slice 0
};

// How a rank announces operation number `sequence`: its call, where its buffers are and, if they are small,
// the data itself in the same cache line. Slots rotate, so no barrier is needed after an operation.
struct OutboxPost {
  std::atomic<std::uint64_t> sequence;
  PackedCall call;
  Routing routing;
  std::uint64_t numel;
  Location source;
  Location output;
  std::byte payload[8];  // continues for eager_bytes
};
static_assert(sizeof(OutboxPost) == 64 && sizeof(PackedCall) == 4 && sizeof(Routing) == 4);

// Why a rank gave up, in one word: peers read it in one load. All zero while it has not.
struct Poison {
  std::uint32_t culprit_plus_one = 0;
  std::uint32_t kind = 0;  // a FailureKind

  static std::uint64_t packed(const Failure& failure) {
    return std::bit_cast<std::uint64_t>(
        Poison{static_cast<std::uint32_t>(failure.rank + 1), static_cast<std::uint32_t>(failure.kind)});
  }
  static Poison unpacked(std::uint64_t word) { return std::bit_cast<Poison>(word); }
};

// The value of a counter of slices: the operation's number in the high bits, the number of slices in the
// low 24.
constexpr std::uint64_t mark(std::uint64_t sequence, std::uint64_t slices) {
  return (sequence << 24) | slices;
}

class Outbox {
 public:
  static constexpr int num_posts = 4;
  static constexpr std::size_t eager_bytes = 32 << 10;
  // Reductions up to this size travel with their posts. Less for more ranks, because each rank reads all
  // posts.
  static constexpr std::size_t eager_reduce_bytes(int num_ranks) {
    return 4 * eager_bytes / static_cast<std::size_t>(num_ranks < 2 ? 2 : num_ranks);
  }
  // Of those, reductions up to this size travel in the post itself, larger ones in the ring.
  static constexpr std::size_t inline_bytes = 1 << 10;
  // An exchange begins with a table of the receivers' ranges; the same range for all stands there once.
  static constexpr std::size_t table_bytes(int num_ranks, bool is_same_for_all) {
    return sizeof(Range) * (is_same_for_all ? 1u : static_cast<std::size_t>(num_ranks));
  }
  // Exchanges up to this size travel with their posts, after the table.
  static constexpr std::size_t eager_exchange_bytes(int num_ranks, bool is_same_for_all) {
    const std::size_t table = table_bytes(num_ranks, is_same_for_all);
    return table < eager_bytes ? eager_bytes - table : 0;
  }
  // Writing to a line that a peer has read costs several times as much as reading what it wrote. So the rings
  // of stages are larger than a core's cache: most lines have left it when they are used again. In addition,
  // the ranks of a reduction exchange their places in the rings whenever these wrap (combine.cpp,
  // SharedMemoryGroup::ring_of), so that each rank writes where it has read before.
  static constexpr int num_stages = 8;
  static constexpr std::size_t stage_bytes = 256 << 10;
  static constexpr std::size_t ring_bytes = num_stages * stage_bytes;
  static constexpr std::size_t pipe_bytes = 64 << 10;

  Outbox() = default;
  Outbox(std::byte* base, int num_ranks) : base_(base), num_ranks_(num_ranks) {}

  static std::size_t num_bytes(int num_ranks) {
    return Outbox(nullptr, num_ranks).pipes_offset() + static_cast<std::size_t>(num_ranks) * pipe_bytes;
  }

  using Counter = std::atomic<std::uint64_t>;
  Counter& done() const { return counter(0); }                  // the last operation that is finished
  Counter& poison() const { return counter(1); }                // a packed Poison
  Counter& staged() const { return counter(2); }                // slices copied in
  Counter& reduced() const { return counter(3); }               // slices of the own part reduced
  Counter& consumed() const { return counter(4); }              // slices copied out
  Counter& taken(int peer) const { return counter(5 + peer); }  // slices read from `peer`
  Counter& piped(int peer) const {
    return counter(5 + num_ranks_ + peer);
  }  // bytes put in the pipe to `peer`
  Counter& drained(int peer) const { return counter(5 + 2 * num_ranks_ + peer); }  // bytes read from its pipe
  Counter& left(int peer) const {
    return counter(5 + 3 * num_ranks_ + peer);
  }  // set by `peer` when it closes

  OutboxPost& post(std::uint64_t sequence) const {
    return *reinterpret_cast<OutboxPost*>(base_ + posts_offset() + (sequence % num_posts) * post_stride);
  }
  // A stage of an exchange: each sender takes its own.
  std::byte* stage(std::uint64_t slice) const {
    return base_ + stages_offset() + ring_bytes + slice % num_stages * stage_bytes;
  }
  // The ring of reductions: all ranks use the same places at the same time.
  std::byte* ring(std::uint64_t offset) const { return base_ + stages_offset() + offset; }
  std::byte* pipe(int peer) const {
    return base_ + pipes_offset() + static_cast<std::size_t>(peer) * pipe_bytes;
  }
  std::byte* base() const { return base_; }

 private:
  static constexpr std::size_t post_stride = eager_bytes + 4096;

  Counter& counter(int i) const {
    return *reinterpret_cast<Counter*>(base_ + static_cast<std::size_t>(i) * 64);
  }
  std::size_t posts_offset() const {
    return (static_cast<std::size_t>(5 + 4 * num_ranks_) * 64 + 4095) / 4096 * 4096;
  }
  std::size_t stages_offset() const { return posts_offset() + num_posts * post_stride; }
  std::size_t pipes_offset() const { return stages_offset() + 2 * ring_bytes; }

  std::byte* base_ = nullptr;
  int num_ranks_ = 0;
};

}  // namespace paceline
