// broadcast, all_gather(v), gather, scatter, all_to_all(v) and barrier over shared memory: every rank has a
// range of its source for each peer, and a place in its output for what each peer sends. The sender chooses
// how it travels:
//
// eager      in the post, together with a table of the ranges
// zero-copy  the source lies in shared memory: the receivers read it there
// staged     slices through cache-sized stages, divided among the receivers
#include <algorithm>
#include <cstring>

#include "core/engine/engine.h"
#include "core/shared_memory/shared_memory_group.h"

namespace paceline {
namespace {

struct SharedMemoryExchange {
  SharedMemoryGroup& group;
  Operation& op;
  Request& request;
  int size, rank;
  Protocol protocol = Protocol::eager;
  std::uint64_t slices_sent = 0, slices_to_send = 0;
  std::vector<std::uint64_t> slices_received;
  std::vector<bool> is_received;
  int num_missing = 0;

  SharedMemoryExchange(SharedMemoryGroup& g, Operation& o)
      : group(g), op(o), request(o.request), size(g.size()), rank(g.rank()) {
    slices_received.assign(static_cast<std::size_t>(size), 0);
    is_received.assign(static_cast<std::size_t>(size), true);
  }

  Range to(int p) const {
    if (request.send.empty()) return {};
    return request.is_same_for_all ? request.send[0] : request.send[static_cast<std::size_t>(p)];
  }
  Range from(int p) const {
    return request.receive.empty() ? Range{} : request.receive[static_cast<std::size_t>(p)];
  }
  bool sends_to(int p) const { return p != rank && to(p).num_bytes > 0; }
  // Whether this rank waits for `p`: for all ranks in a barrier, otherwise for those that have data for it.
  bool expects(int p) const {
    return p != rank && (request.kind == OperationKind::barrier || from(p).num_bytes > 0);
  }

  std::size_t sent_bytes() const {
    if (request.is_same_for_all) return to(0).num_bytes;
    std::size_t total = 0;
    for (const Range& r : request.send) total += r.num_bytes;
    return total;
  }
  std::size_t source_end() const {
    std::size_t end = 0;
    for (const Range& r : request.send) end = std::max(end, r.offset + r.num_bytes);
    return end;
  }

  // ---- sending
  void announce() {
    const bool same = request.is_same_for_all;
    OutboxPost& post = group.prepare_post(op);
    if (sent_bytes() > Outbox::eager_exchange_bytes(size, same)) {
      post.source = group.memory().arena().locate(request.source, source_end());
      protocol = post.source.is_shared() ? Protocol::zero_copy : Protocol::staged;
    }
    post.routing.protocol = protocol;
    post.routing.is_same_for_all = same;
    post.routing.first_stage = group.first_stage() & 0xffffu;
    // The table holds the range of each receiver: in the payload, in the source, or in all slices together.
    std::size_t at = Outbox::table_bytes(size, same);
    for (int p = 0; p < (same ? 1 : size); ++p) {
      Range range = to(p);
      if (protocol == Protocol::eager) {
        if (range.num_bytes > 0)
          std::memcpy(post.payload + at, request.source + range.offset, range.num_bytes);
        range.offset = at;
        at += range.num_bytes;
      }
      std::memcpy(post.payload + sizeof(Range) * static_cast<std::size_t>(p), &range, sizeof range);
    }
    if (protocol == Protocol::staged)
      for (int p = 0; p < size; ++p)
        if (sends_to(p)) slices_to_send = std::max(slices_to_send, num_slices(to(p).num_bytes, same));
    group.publish(post.sequence, op.sequence);
    for (int p = 0; p < size; ++p)
      if (expects(p)) {
        is_received[static_cast<std::size_t>(p)] = false;
        ++num_missing;
      }
    if (from(rank).num_bytes > 0)
      std::memmove(request.output + from(rank).offset, request.source + to(rank).offset,
                   from(rank).num_bytes);
  }

  std::size_t piece_bytes(bool same) const {
    return same ? Outbox::stage_bytes : Outbox::stage_bytes / static_cast<std::size_t>(size) / 64 * 64;
  }
  std::uint64_t num_slices(std::size_t num_bytes, bool same) const {
    return (num_bytes + piece_bytes(same) - 1) / piece_bytes(same);
  }
  Range piece(const Range& whole, std::uint64_t k, bool same) const {
    const std::size_t start = std::min(k * piece_bytes(same), whole.num_bytes);
    return {whole.offset + start, std::min(piece_bytes(same), whole.num_bytes - start)};
  }

  // Copies slice `slices_sent` into its stage if all receivers of the slice that was there have read it.
  bool try_stage() {
    const std::uint64_t k = slices_sent;
    if (k >= slices_to_send) return false;
    const bool same = request.is_same_for_all;
    if (k == 0) {
      if (!group.is_stage_free(op)) return false;
      group.take_stages(op, slices_to_send);
    }
    for (int p = 0; p < size && k >= Outbox::num_stages; ++p) {
      const std::uint64_t previous = k - Outbox::num_stages;
      if (!sends_to(p) || previous >= num_slices(to(p).num_bytes, same)) continue;
      if (group.outbox(p).taken(rank).load() < mark(op.sequence, previous + 1)) {
        op.waiting_for = p;
        return false;
      }
    }
    for (int p = 0; p < size; ++p) {
      if (!sends_to(p)) continue;
      const Range range = piece(to(p), k, same);
      std::byte* room =
          group.stage(op, rank, k) + (same ? 0 : static_cast<std::size_t>(p) * piece_bytes(false));
      std::memcpy(room, request.source + range.offset, range.num_bytes);
      if (same) break;
    }
    ++slices_sent;
    group.publish(group.own().staged(), mark(op.sequence, slices_sent));
    return true;
  }

  // ---- receiving
  bool try_receive(int p) {
    if (!group.has_posted(op, p)) return false;
    const OutboxPost& post = group.outbox(p).post(op.sequence);
    const bool same = post.routing.is_same_for_all != 0;
    Range theirs;
    std::memcpy(&theirs, post.payload + (same ? 0 : sizeof(Range) * static_cast<std::size_t>(rank)),
                sizeof theirs);
    const Range mine = from(p);
    if (theirs.num_bytes != mine.num_bytes && request.kind != OperationKind::barrier)
      throw Failed({FailureKind::mismatch, p,
                    "rank " + std::to_string(p) + " sends " + std::to_string(theirs.num_bytes) +
                        " bytes, this rank expects " + std::to_string(mine.num_bytes) +
                        ": check the counts"});
    std::byte* output = request.output + mine.offset;
    switch (post.routing.protocol) {
      case Protocol::eager:
        if (mine.num_bytes > 0) std::memcpy(output, post.payload + theirs.offset, mine.num_bytes);
        break;
      case Protocol::zero_copy: {
        const std::byte* source = group.peer(p).resolve(post.source, theirs.offset + theirs.num_bytes);
        std::memcpy(output, source + theirs.offset, mine.num_bytes);
        group.publish(group.own().taken(p), mark(op.sequence, 1));
        break;
      }
      case Protocol::staged: {
        std::uint64_t& k = slices_received[static_cast<std::size_t>(p)];
        if (group.outbox(p).staged().load() < mark(op.sequence, k + 1)) {
          op.waiting_for = p;
          return false;
        }
        const Range range = piece({0, mine.num_bytes}, k, same);
        const std::byte* room =
            group.stage(op, p, k) + (same ? 0 : static_cast<std::size_t>(rank) * piece_bytes(false));
        std::memcpy(output + range.offset, room, range.num_bytes);
        group.publish(group.own().taken(p), mark(op.sequence, ++k));
        if (k < num_slices(mine.num_bytes, same)) return true;
        break;
      }
    }
    is_received[static_cast<std::size_t>(p)] = true;
    --num_missing;
    return true;
  }

  // One look at everything; true once nothing is left to do.
  bool advance() {
    group.did_move |= try_stage();
    for (int i = 1; i < size && num_missing > 0; ++i) {
      const int p = (rank + i) % size;
      if (!is_received[static_cast<std::size_t>(p)]) group.did_move |= try_receive(p);
    }
    return num_missing == 0 && slices_sent == slices_to_send;
  }

  // The source may change once this operation is over, so the ranks that read it in place must have finished.
  bool is_source_read() {
    for (int p = 0; p < size; ++p)
      if (sends_to(p) && group.outbox(p).taken(rank).load() < mark(op.sequence, 1)) {
        op.waiting_for = p;
        return false;
      }
    return true;
  }
};

}  // namespace

Task exchange(SharedMemoryGroup& group, Operation& op) {
  SharedMemoryExchange e(group, op);
  co_await Until([&] { return group.can_post(op.sequence); });
  e.announce();
  if (op.is_heavy) co_await Pause();
  co_await Until([&] { return e.advance(); });
  if (e.protocol == Protocol::zero_copy) co_await Until([&] { return e.is_source_read(); });
}

}  // namespace paceline
