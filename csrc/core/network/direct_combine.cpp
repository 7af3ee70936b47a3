// all_reduce, reduce and reduce_scatter over a Transport; see direct.h for the forms and their costs.
#include <algorithm>
#include <cstring>
#include <memory>

#include "core/network/direct.h"
#include "core/base/reduce.h"

namespace paceline {
namespace {

// Of the messages between two ranks; see GroupTransport::tag.
enum CombinePhase : std::uint64_t { call, contribution, result };

constexpr std::size_t max_window = 8;
constexpr std::size_t max_slice_bytes = 256 << 10, min_slice_bytes = 16 << 10;

struct NetworkReduction {
  GroupTransport& ranks;
  Operation& op;
  Request& request;
  const int size, rank;
  const std::size_t element;
  const bool gives_all, has_output;
  std::vector<const void*> from;

  NetworkReduction(GroupTransport& g, Operation& o)
      : ranks(g),
        op(o),
        request(o.request),
        size(g.size()),
        rank(g.rank),
        element(size_of(o.request.dtype)),
        gives_all(o.request.kind == OperationKind::all_reduce),
        has_output(o.request.kind != OperationKind::reduce || g.rank == o.request.root),
        from(static_cast<std::size_t>(g.size())) {
    if (request.parts.empty()) cut();
  }

  // Even parts on cache-line boundaries.
  void cut() {
    const std::size_t lines = (request.numel * element + 63) / 64;
    const auto edge = [&](int p) {
      return std::min(lines * static_cast<std::size_t>(p) / static_cast<std::size_t>(size) * 64,
                      request.numel * element);
    };
    for (int p = 0; p < size; ++p) request.parts.push_back({edge(p), edge(p + 1) - edge(p)});
  }

  const Range& part(int p) const { return request.parts[static_cast<std::size_t>(p)]; }
  std::size_t total() const {
    std::size_t end = 0;
    for (const Range& r : request.parts) end = std::max(end, r.offset + r.num_bytes);
    return end;
  }
  std::size_t output_offset(int p) const {
    return request.kind == OperationKind::reduce_scatter ? 0 : part(p).offset;
  }
  bool receives_results(int p) const {
    return gives_all || (request.kind == OperationKind::reduce && p == request.root);
  }

  void run(std::byte* to, std::size_t num_bytes) {
    void* destination = to;
    reduce(request.dtype, request.op, &destination, 1, from.data(), size, num_bytes / element, size);
  }

  // Slices of part p: about eight, so that combining, sending and receiving overlap.
  std::size_t slice_bytes_of(int p) const {
    const std::size_t wanted = (part(p).num_bytes / 8 + 63) / 64 * 64;
    return std::clamp(wanted, min_slice_bytes, max_slice_bytes);
  }
  // Slices of part p that may be in flight to its owner: all of a small part, a megabyte of a large one.
  std::size_t window_of(int p) const {
    return std::clamp((std::size_t{1} << 20) / slice_bytes_of(p), std::size_t{4}, max_window);
  }
  std::size_t num_slices(int p) const {
    return (part(p).num_bytes + slice_bytes_of(p) - 1) / slice_bytes_of(p);
  }
  Range slice(int p, std::size_t k) const {  // relative to the part
    const std::size_t start = std::min(k * slice_bytes_of(p), part(p).num_bytes);
    return {start, std::min(slice_bytes_of(p), part(p).num_bytes - start)};
  }
};

// Each rank gets all data that it needs in one step and combines it.
struct OneStep : NetworkReduction {
  std::vector<std::byte> memory;  // room to receive from each peer, and to send
  std::size_t stride;
  Flight flight;

  OneStep(GroupTransport& g, Operation& o)
      : NetworkReduction(g, o),
        stride((sizeof(CallHeader) + total() + 63) / 64 * 64),
        flight(g, o, 2 * static_cast<std::size_t>(g.size())) {
    memory.resize(stride * static_cast<std::size_t>(size));
  }

  std::byte* room(int p) { return memory.data() + stride * static_cast<std::size_t>(p); }
  Range needed_by(int p) const {
    if (request.kind == OperationKind::reduce_scatter) return part(p);
    return {0, gives_all || p == request.root ? total() : 0};
  }
  void begin() {
    for (int i = 1; i < size; ++i) {
      const int p = (rank + size - i) % size;
      if (has_output) flight.receive(p, call, room(p), sizeof(CallHeader) + needed_by(rank).num_bytes);
    }
    // The rank's own room is used for sending: header and data in one message.
    const CallHeader header = CallHeader::of(request);
    std::memcpy(room(rank), &header, sizeof header);
    if (request.kind != OperationKind::reduce_scatter) {
      if (total() > 0) std::memcpy(room(rank) + sizeof header, request.source, total());
      for (int i = 1; i < size; ++i)
        if (const int p = (rank + i) % size; gives_all || p == request.root)
          flight.send(p, call, room(rank), sizeof header + total());
      return;
    }
    pieces.resize(stride * static_cast<std::size_t>(size));
    for (int i = 1; i < size; ++i) {
      const int p = (rank + i) % size;
      std::byte* piece = pieces.data() + stride * static_cast<std::size_t>(p);
      std::memcpy(piece, &header, sizeof header);
      if (part(p).num_bytes > 0)
        std::memcpy(piece + sizeof header, request.source + part(p).offset, part(p).num_bytes);
      flight.send(p, call, piece, sizeof header + part(p).num_bytes);
    }
  }
  void finish() {
    if (!has_output) return;
    const Range mine = needed_by(rank);
    for (int p = 0; p < size; ++p) {
      const auto i = static_cast<std::size_t>(p);
      if (p == rank) {
        from[i] = request.source + mine.offset;
        continue;
      }
      CallHeader theirs;
      std::memcpy(&theirs, room(p), sizeof theirs);
      check_call(op, p, theirs);
      from[i] = room(p) + sizeof theirs;
    }
    if (mine.num_bytes > 0) run(request.output, mine.num_bytes);
  }
  std::vector<std::byte> pieces;  // of a reduce_scatter: what goes to each rank
};

// Contributions go to the owners of parts, results come back from them, slice by slice.
struct TwoStep : NetworkReduction {
  struct PeerProgress {  // with one peer
    Transfer* call = nullptr;
    bool is_checked = false;
    CallHeader header;
    std::size_t num_sent = 0, num_returned = 0;  // slices of the peer's part
    std::vector<Transfer*> results;              // slices of the peer's part, back from it
    Transfer* arriving[max_window] = {};         // contributions to this rank's part, by slice
  };
  std::vector<PeerProgress> peers;
  std::size_t num_combined = 0, num_posted = 0;  // slices of this rank's part
  CallHeader header;
  std::unique_ptr<std::byte[]> rooms;    // for contributions: window slices from every peer
  std::unique_ptr<std::byte[]> results;  // of this rank's part, if it has no output (reduce)
  Flight flight;

  static std::size_t planned(const NetworkReduction& c) {
    std::size_t n = 0;
    for (int p = 0; p < c.size; ++p) n += 2 + 4 * std::max(c.num_slices(p), c.num_slices(c.rank));
    return n;
  }

  TwoStep(GroupTransport& g, Operation& o)
      : NetworkReduction(g, o),
        peers(static_cast<std::size_t>(size)),
        header(CallHeader::of(o.request)),
        flight(g, o, planned(*this)) {
    const std::size_t slots = window_of(rank) * static_cast<std::size_t>(size);
    rooms = std::make_unique_for_overwrite<std::byte[]>(slots * slice_bytes_of(rank));
    if (!has_output) results = std::make_unique_for_overwrite<std::byte[]>(part(rank).num_bytes);
  }

  PeerProgress& with(int p) { return peers[static_cast<std::size_t>(p)]; }
  std::byte* room(int p, std::size_t k) {
    return rooms.get() +
           (static_cast<std::size_t>(p) * window_of(rank) + k % window_of(rank)) * slice_bytes_of(rank);
  }
  std::byte* result_of(std::size_t k) {
    std::byte* base = has_output ? request.output + output_offset(rank) : results.get();
    return base + slice(rank, k).offset;
  }

  void begin() {
    for (int i = 1; i < size; ++i) {
      const int p = (rank + size - i) % size;
      PeerProgress& e = with(p);
      e.call = &flight.receive(p, call, reinterpret_cast<std::byte*>(&e.header), sizeof e.header);
      if (!receives_results(rank)) continue;
      for (std::size_t k = 0; k < num_slices(p); ++k) {
        const Range r = slice(p, k);
        e.results.push_back(
            &flight.receive(p, result, request.output + output_offset(p) + r.offset, r.num_bytes));
      }
    }
    post_contributions();
    for (int i = 1; i < size; ++i)
      flight.send((rank + i) % size, call, reinterpret_cast<const std::byte*>(&header), sizeof header);
    send_contributions();
  }

  void post_contributions() {
    for (; num_posted < std::min(num_combined + window_of(rank), num_slices(rank)); ++num_posted)
      for (int i = 1; i < size; ++i) {
        const int p = (rank + size - i) % size;
        with(p).arriving[num_posted % window_of(rank)] =
            &flight.receive(p, contribution, room(p, num_posted), slice(rank, num_posted).num_bytes);
      }
  }

  // A result shows that its owner has received this rank's contribution, so another one may follow. A rank
  // that gets no results leaves the pace to the transport's credit.
  bool send_contributions() {
    bool has_moved = false;
    for (std::size_t round = 0; round < max_window; ++round)
      for (int i = 1; i < size; ++i) {
        const int p = (rank + i) % size;
        PeerProgress& e = with(p);
        while (e.num_returned < e.results.size() && e.results[e.num_returned]->state == Transfer::State::done)
          ++e.num_returned;
        const bool is_paced = receives_results(rank);
        const std::size_t limit =
            is_paced ? e.num_returned + std::min(round + 1, window_of(p)) : num_slices(p);
        if (e.num_sent >= std::min(limit, num_slices(p))) continue;
        const Range r = slice(p, e.num_sent++);
        flight.send(p, contribution, request.source + part(p).offset + r.offset, r.num_bytes);
        has_moved = true;
      }
    return has_moved;
  }

  bool check_calls() {
    bool is_complete = true;
    for (int p = 0; p < size; ++p) {
      PeerProgress& e = with(p);
      if (p == rank || e.is_checked) continue;
      if (flight.has_landed(*e.call)) {
        check_call(op, p, e.header);
        e.is_checked = true;
      } else {
        is_complete = false;
      }
    }
    return is_complete;
  }

  bool combine_next() {
    const std::size_t k = num_combined;
    if (k >= num_slices(rank)) return false;
    for (int p = 0; p < size; ++p)
      if (p != rank && !flight.has_landed(*with(p).arriving[k % window_of(rank)])) return false;
    const Range r = slice(rank, k);
    for (int p = 0; p < size; ++p) from[static_cast<std::size_t>(p)] = room(p, k);
    from[static_cast<std::size_t>(rank)] = request.source + part(rank).offset + r.offset;
    std::byte* to = result_of(k);
    run(to, r.num_bytes);
    for (int i = 1; i < size; ++i)
      if (const int p = (rank + i) % size; receives_results(p)) flight.send(p, result, to, r.num_bytes);
    ++num_combined;
    post_contributions();
    return true;
  }

  bool advance() {
    const bool is_agreed = check_calls();
    bool has_moved = send_contributions();
    if (is_agreed) has_moved |= combine_next();
    *ranks.did_move |= has_moved;
    return !has_moved && is_agreed && num_combined == num_slices(rank) && flight.is_landed();
  }
};

}  // namespace

Task combine_directly(GroupTransport& ranks, Operation& op) {
  const std::size_t total = NetworkReduction(ranks, op).total();
  const bool is_small = ranks.size() == 1 || total <= ranks.one_step_bytes;
  if (is_small) {
    OneStep c(ranks, op);
    c.begin();
    co_await Until([&] { return c.flight.is_landed(); });
    c.finish();
    co_return;
  }
  TwoStep c(ranks, op);
  c.begin();
  co_await Until([&] { return c.advance(); });
}

}  // namespace paceline
