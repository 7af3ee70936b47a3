// all_reduce, reduce, reduce_scatter over shared memory.
//
// eager      Small: the data of each rank travels in its post, or beside it in the ring; each rank reduces
//            what it needs. 1 step.
// zero-copy  All buffers lie in shared memory: rank r reads part r of all sources and writes the result
//            where it belongs, in peers' memory as well. 2 steps, no copy.
// staged     Private buffers: slices go through cache-sized stages; the reduction of one slice overlaps the
//            copies of its neighbours. 3 steps a slice.
//
// Contributions are always combined in the order of ranks, so the three give the same bits.
#include <algorithm>
#include <cstring>
#include <utility>

#include "core/base/reduce.h"
#include "core/engine/engine.h"
#include "core/shared_memory/shared_memory_group.h"

namespace paceline {
namespace {

constexpr std::size_t zero_copy_chunk_bytes = 128 << 10;

struct SharedMemoryReduction {
  SharedMemoryGroup& group;
  Operation& op;
  Request& request;
  int size, rank;
  std::size_t element;
  bool has_output;  // whether this rank receives results
  std::vector<std::byte*> destinations;
  std::vector<const std::byte*> sources;
  std::vector<void*> to;
  std::vector<const void*> from;
  SharedMemoryGroup::RingPlace first;  // of the stages

  SharedMemoryReduction(SharedMemoryGroup& g, Operation& o)
      : group(g), op(o), request(o.request), size(g.size()), rank(g.rank()), element(size_of(request.dtype)) {
    has_output = request.kind != OperationKind::reduce || rank == request.root;
    if (request.parts.empty()) cut();
  }

  // Even parts on cache-line boundaries.
  void cut() {
    const std::size_t lines = (request.numel * element + 63) / 64;
    for (int p = 0; p < size; ++p) {
      const auto edge = [&](std::size_t i) {
        return std::min(lines * i / static_cast<std::size_t>(size) * 64, request.numel * element);
      };
      const std::size_t start = edge(static_cast<std::size_t>(p));
      request.parts.push_back({start, edge(static_cast<std::size_t>(p) + 1) - start});
    }
  }

  const Range& part(int p) const { return request.parts[static_cast<std::size_t>(p)]; }
  std::size_t source_bytes() const {
    std::size_t end = 0;
    for (const Range& r : request.parts) end = std::max(end, r.offset + r.num_bytes);
    return end;
  }
  // Where part p starts in the output of a rank.
  std::size_t output_offset(int p) const {
    return request.kind == OperationKind::reduce_scatter ? 0 : part(p).offset;
  }
  std::size_t output_bytes() const {
    return request.kind == OperationKind::reduce_scatter ? part(rank).num_bytes : source_bytes();
  }

  void run(std::size_t num_bytes) {
    reduce(request.dtype, request.op, to.data(), static_cast<int>(to.size()), from.data(),
           static_cast<int>(from.size()), num_bytes / element, size);
  }

  // ---- eager
  void combine_posts() {
    const bool is_scatter = request.kind == OperationKind::reduce_scatter;
    const std::size_t offset = is_scatter ? part(rank).offset : 0;
    for (int r = 0; r < size; ++r) from.push_back(group.filled(r, op.sequence) + offset);
    from[static_cast<std::size_t>(rank)] = request.source + offset;
    to = {request.output};
    run(output_bytes());
  }

  // ---- zero-copy
  // Fills in where this rank's buffers are; false if peers cannot reach all that they need.
  bool is_reachable() const {
    const Arena& arena = group.memory().arena();
    const bool needs_output =
        request.kind == OperationKind::all_reduce || (request.kind == OperationKind::reduce && has_output);
    OutboxPost& post = group.own().post(op.sequence);
    post.source = arena.locate(request.source, source_bytes());
    post.output = needs_output ? arena.locate(request.output, output_bytes()) : Location{};
    return post.source.is_shared() && (!needs_output || post.output.is_shared());
  }
  bool are_all_reachable() const {
    for (int r = 0; r < size; ++r)
      if (group.outbox(r).post(op.sequence).routing.protocol != Protocol::zero_copy) return false;
    return true;
  }
  void open_buffers() {
    const std::size_t total = source_bytes();
    for (int r = 0; r < size; ++r) {
      const OutboxPost& post = group.outbox(r).post(op.sequence);
      sources.push_back(r == rank ? request.source : group.peer(r).resolve(post.source, total));
      if (request.kind == OperationKind::all_reduce ||
          (request.kind == OperationKind::reduce && r == request.root))
        destinations.push_back(r == rank ? request.output : group.peer(r).resolve(post.output, total));
    }
    if (request.kind == OperationKind::reduce_scatter) destinations.push_back(request.output);
  }
  void combine_in_place(std::size_t at, std::size_t num_bytes) {
    from.clear();
    to.clear();
    for (const std::byte* s : sources) from.push_back(s + part(rank).offset + at);
    for (std::byte* d : destinations) to.push_back(d + output_offset(rank) + at);
    run(num_bytes);
  }

  // ---- staged
  // A stage has room for one piece of each part; the region of the rank's own part holds the result. Each
  // rank writes where it has read in the lap before, because those lines are in its cache: in every other
  // lap, two ranks exchange the regions that they have for each other, and in each lap the regions of results
  // move on by one rank.
  std::size_t piece_bytes() const { return Outbox::stage_bytes / static_cast<std::size_t>(size) / 64 * 64; }
  std::uint64_t num_slices() const {
    std::size_t longest = 0;
    for (const Range& r : request.parts) longest = std::max(longest, r.num_bytes);
    return (longest + piece_bytes() - 1) / piece_bytes();
  }
  // Slice k of part p, relative to the part.
  Range piece(int p, std::uint64_t k) const {
    const std::size_t start = std::min(k * piece_bytes(), part(p).num_bytes);
    return {start, std::min(piece_bytes(), part(p).num_bytes - start)};
  }
  // The place of slice k of what rank `r` has for rank `p`: its contribution, or its result for all ranks if
  // r is p.
  std::byte* stage(int r, std::uint64_t k, int p) const {
    const SharedMemoryGroup::RingPlace place = SharedMemoryGroup::ring_place(first, k);
    if (r == p) {
      r = p =
          static_cast<int>((static_cast<std::uint64_t>(r) + place.lap) % static_cast<std::uint64_t>(size));
    } else if (place.lap % 2 != 0) {
      std::swap(r, p);
    }
    return group.outbox(r).ring(place.at) + static_cast<std::size_t>(p) * piece_bytes();
  }
  // Two ranks exchange all their regions: for them the caches are the cheaper way, however far apart the
  // cores are.
  bool writes_past_caches() const { return size > 2 && group.memory().copier().goes_past_caches(); }
  void copy_in(std::uint64_t k) {
    for (int i = 1; i < size; ++i) {
      const int p = (rank + i) % size;
      const Range range = piece(p, k);
      const std::byte* data = request.source + part(p).offset + range.offset;
      if (size > 2) group.memory().copier().copy(stage(rank, k, p), data, range.num_bytes);
      else if (range.num_bytes > 0) std::memcpy(stage(rank, k, p), data, range.num_bytes);
    }
    group.publish(group.own().staged(), mark(op.sequence, k + 1));
  }
  void combine_stages(std::uint64_t k) {
    const Range range = piece(rank, k);
    from.clear();
    to.clear();
    for (int r = 0; r < size; ++r) from.push_back(stage(r, k, rank));
    from[static_cast<std::size_t>(rank)] = request.source + part(rank).offset + range.offset;
    if (has_output) to.push_back(request.output + output_offset(rank) + range.offset);
    const bool is_copied = has_output && writes_past_caches();
    const bool is_shared_result = request.kind != OperationKind::reduce_scatter;
    if (is_shared_result && !is_copied) to.push_back(stage(rank, k, rank));
    if (range.num_bytes > 0) run(range.num_bytes);
    if (is_shared_result && is_copied)
      group.memory().copier().copy(stage(rank, k, rank), static_cast<std::byte*>(to[0]), range.num_bytes);
    group.publish(group.own().reduced(), mark(op.sequence, k + 1));
  }
  void copy_out(std::uint64_t k) {
    if (has_output && request.kind != OperationKind::reduce_scatter)
      for (int i = 1; i < size; ++i) {
        const int p = (rank + i) % size;
        const Range range = piece(p, k);
        std::memcpy(request.output + part(p).offset + range.offset, stage(p, k, p), range.num_bytes);
      }
    group.publish(group.own().consumed(), mark(op.sequence, k + 1));
  }
  bool have_all(Outbox::Counter& (Outbox::*counter)() const, std::uint64_t slices) {
    for (int r = 0; r < size; ++r)
      if (r != rank && (group.outbox(r).*counter)().load() < mark(op.sequence, slices)) {
        op.waiting_for = r;
        return false;
      }
    return true;
  }
  bool have_all_posted() {
    for (int r = 0; r < size; ++r)
      if (r != rank && !group.has_posted(op, r)) return false;
    return true;
  }
};

}  // namespace

Task combine(SharedMemoryGroup& group, Operation& op) {
  SharedMemoryReduction c(group, op);
  if (c.size == 1 && c.request.source == c.request.output) co_return;
  const std::size_t total = c.source_bytes();
  const bool is_eager = total <= Outbox::eager_reduce_bytes(c.size);
  if (!op.is_announced) {
    co_await Until([&] { return group.can_post(op.sequence); });
    if (is_eager) co_await Until([&] { return group.is_ring_free(op, false); });
    OutboxPost& post = group.prepare_post(op);
    if (is_eager) {
      group.fill(post, op.sequence, c.request.source, total);
    } else {
      post.routing.protocol = c.is_reachable() ? Protocol::zero_copy : Protocol::staged;
    }
    group.publish(post.sequence, op.sequence);
  }
  if (is_eager) {
    co_await Until([&] { return c.have_all_posted(); });
    if (c.has_output && total > 0) c.combine_posts();
    co_return;
  }

  if (op.is_heavy) co_await Pause();
  co_await Until([&] { return c.have_all_posted(); });
  if (c.are_all_reachable()) {
    c.open_buffers();
    for (std::size_t at = 0; at < c.part(c.rank).num_bytes; at += zero_copy_chunk_bytes) {
      c.combine_in_place(at, std::min(zero_copy_chunk_bytes, c.part(c.rank).num_bytes - at));
      if (op.is_heavy) co_await Pause();
    }
    group.publish(group.own().reduced(), mark(op.sequence, 1));
    co_await Until([&] { return c.have_all(&Outbox::reduced, 1); });
    co_return;
  }

  co_await Until([&] { return group.is_ring_free(op, true); });
  const std::uint64_t slices = c.num_slices();
  c.first = group.take_ring_stages(op, slices);
  // Ranks that share cores take turns: each does several slices in its turn.
  const std::uint64_t lag = group.engine().is_crowded() ? Outbox::num_stages / 4 : 1;
  for (std::uint64_t k = 0; k < slices + 2 * lag; ++k) {
    if (k > 0 && op.is_heavy) co_await Pause();  // something urgent may overtake
    if (k < slices) {
      if (k >= Outbox::num_stages)
        co_await Until([&] { return c.have_all(&Outbox::consumed, k + 1 - Outbox::num_stages); });
      c.copy_in(k);
    }
    if (k >= lag && k - lag < slices) {
      co_await Until([&] { return c.have_all(&Outbox::staged, k - lag + 1); });
      c.combine_stages(k - lag);
    }
    if (k >= 2 * lag) {
      co_await Until([&] { return c.have_all(&Outbox::reduced, k - 2 * lag + 1); });
      c.copy_out(k - 2 * lag);
    }
  }
}

}  // namespace paceline
