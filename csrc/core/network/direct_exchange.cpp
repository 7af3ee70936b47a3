// broadcast, gathers, scatter, all_to_all and barrier over a Transport; see direct.h for the forms and their
// costs.
#include <algorithm>
#include <cstring>

#include "core/network/direct.h"

namespace paceline {
namespace {

// Of the messages between two ranks; see GroupTransport::tag.
enum ExchangePhase : std::uint64_t { call, data };

constexpr std::size_t inline_bytes = 8 << 10;  // data up to here travels with the call, copied once

}  // namespace

// Every rank has a range of its source for each peer, and a place in its output for what each peer sends.
Task exchange_directly(GroupTransport& ranks, Operation& op) {
  const Request& request = op.request;
  const int size = ranks.size(), rank = ranks.rank;
  const auto to = [&](int p) {
    if (request.send.empty()) return Range{};
    return request.is_same_for_all ? request.send[0] : request.send[static_cast<std::size_t>(p)];
  };
  const auto from = [&](int p) {
    return request.receive.empty() ? Range{} : request.receive[static_cast<std::size_t>(p)];
  };
  constexpr std::size_t stride = sizeof(CallHeader) + inline_bytes;
  std::vector<std::byte> in(stride * static_cast<std::size_t>(size)),
      out(stride * static_cast<std::size_t>(size));
  Flight flight(ranks, op, 4 * static_cast<std::size_t>(size));
  const CallHeader header = CallHeader::of(request);

  for (int i = 1; i < size; ++i) {
    const int p = (rank + size - i) % size;
    const Range range = from(p);
    if (range.num_bytes == 0) continue;
    const bool is_inline = range.num_bytes <= inline_bytes;
    flight.receive(p, call, &in[stride * static_cast<std::size_t>(p)],
                   sizeof header + (is_inline ? range.num_bytes : 0));
    if (!is_inline) flight.receive(p, data, request.output + range.offset, range.num_bytes);
  }
  for (int i = 1; i < size; ++i) {
    const int p = (rank + i) % size;
    const Range range = to(p);
    if (range.num_bytes == 0) continue;
    const bool is_inline = range.num_bytes <= inline_bytes;
    std::byte* message = &out[stride * static_cast<std::size_t>(p)];
    std::memcpy(message, &header, sizeof header);
    if (is_inline) std::memcpy(message + sizeof header, request.source + range.offset, range.num_bytes);
    flight.send(p, call, message, sizeof header + (is_inline ? range.num_bytes : 0));
    if (!is_inline) flight.send(p, data, request.source + range.offset, range.num_bytes);
  }
  if (from(rank).num_bytes > 0)
    std::memmove(request.output + from(rank).offset, request.source + to(rank).offset, from(rank).num_bytes);

  co_await Until([&] { return flight.is_landed(); });
  for (int p = 0; p < size; ++p) {
    const Range range = from(p);
    if (p == rank || range.num_bytes == 0) continue;
    CallHeader theirs;
    const std::byte* message = &in[stride * static_cast<std::size_t>(p)];
    std::memcpy(&theirs, message, sizeof theirs);
    check_call(op, p, theirs);
    if (range.num_bytes <= inline_bytes)
      std::memcpy(request.output + range.offset, message + sizeof theirs, range.num_bytes);
  }
}

// Slice j goes from the root to its owner and from there to the others, so that the root sends every byte
// once. The ranks after the root own slices in turn. Slices are sent in order: the first ones are passed on
// while the root still sends the last ones.
Task broadcast_directly(GroupTransport& ranks, Operation& op) {
  const Request& request = op.request;
  const int size = ranks.size(), rank = ranks.rank, root = request.root;
  const std::size_t total = request.numel * size_of(request.dtype);
  const std::size_t slice_bytes =
      std::clamp((total / static_cast<std::size_t>(std::max(1, 4 * (size - 1))) + 63) / 64 * 64,
                 std::size_t{16} << 10, std::size_t{256} << 10);
  if (size <= 2 || total <= 2 * slice_bytes) {
    Task direct = exchange_directly(ranks, op);
    co_await Until([&] { return direct.is_done() || (direct.step() && direct.is_done()); });
    co_return;
  }
  const std::size_t num_slices = (total + slice_bytes - 1) / slice_bytes;
  const auto owner = [&](std::size_t j) {
    return (root + 1 + static_cast<int>(j % static_cast<std::size_t>(size - 1))) % size;
  };
  const auto length = [&](std::size_t j) { return std::min(slice_bytes, total - j * slice_bytes); };
  Flight flight(ranks, op, 2 + num_slices * static_cast<std::size_t>(size));
  CallHeader header = CallHeader::of(request), theirs;

  if (rank == root) {
    for (int i = 1; i < size; ++i)
      flight.send((root + i) % size, call, reinterpret_cast<const std::byte*>(&header), sizeof header);
    for (std::size_t j = 0; j < num_slices; ++j)
      flight.send(owner(j), data, request.source + j * slice_bytes, length(j));
    if (request.output && request.output != request.source)
      std::memmove(request.output, request.source, total);
    co_await Until([&] { return flight.is_landed(); });
    co_return;
  }
  Transfer& called = flight.receive(root, call, reinterpret_cast<std::byte*>(&theirs), sizeof theirs);
  std::vector<Transfer*> mine;
  for (std::size_t j = 0; j < num_slices; ++j) {
    const bool is_mine = owner(j) == rank;
    Transfer& t =
        flight.receive(is_mine ? root : owner(j), data, request.output + j * slice_bytes, length(j));
    if (is_mine) mine.push_back(&t);
  }
  co_await Until([&] { return flight.has_landed(called); });
  check_call(op, root, theirs);
  for (Transfer* t : mine) {
    co_await Until([&] { return flight.has_landed(*t); });
    for (int i = 1; i < size; ++i)
      if (const int p = (rank + i) % size; p != root) flight.send(p, data, t->data, t->num_bytes);
  }
  co_await Until([&] { return flight.is_landed(); });
}

Task barrier_directly(GroupTransport& ranks, Operation& op) {
  const int size = ranks.size(), rank = ranks.rank;
  Flight flight(ranks, op, 2 * 32);
  const CallHeader header = CallHeader::of(op.request);
  std::vector<CallHeader> theirs(32);
  std::uint64_t round = 0;
  for (int step = 1; step < size; step *= 2, ++round) {
    const int ahead = (rank + step) % size, behind = (rank + size - step) % size;
    // Phase 0 matches the first message of other operations, so that differing calls are noticed.
    Transfer& heard =
        flight.receive(behind, round, reinterpret_cast<std::byte*>(&theirs[round]), sizeof header);
    flight.send(ahead, round, reinterpret_cast<const std::byte*>(&header), sizeof header);
    co_await Until([&] { return flight.has_landed(heard); });
    check_call(op, behind, theirs[round]);
  }
  co_await Until([&] { return flight.is_landed(); });
}

}  // namespace paceline
