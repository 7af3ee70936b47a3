// Operations of a hierarchical group. No byte crosses the network twice between the same hosts:
//
// all_reduce, reduce   Every host reduces stripes through shared memory; the k-th ranks of all hosts combine
//                      stripe k over the network; then shared memory again. Small operations have one stripe.
// reduce_scatter       The parts of other hosts' ranks are first reduced within the host, by the owner's
//                      partner there.
// all_gather           Every block travels to one rank of each other host, which passes it on there.
// broadcast, barrier   One rank of each host takes part on the network.
// gather, scatter, all_to_all
//                      Straight to each receiver: through shared memory on the same host, else over the
//                      network.
//
// Contributions are combined in the order of ranks within a host, then in the order of hosts.
#include <algorithm>
#include <cstring>

#include "core/base/reduce.h"
#include "core/hierarchical/hierarchical_group.h"

namespace paceline {
namespace {

constexpr std::size_t one_stripe_bytes = 64 << 10;

Request part_of(const Operation& op, OperationKind kind, const std::byte* source, std::byte* output,
                std::size_t num_bytes) {
  Request r;
  r.kind = kind;
  r.op = op.request.op == ReduceOp::mean ? ReduceOp::sum : op.request.op;
  r.source = source;
  r.output = output;
  r.numel = num_bytes / size_of(op.request.dtype);
  return r;
}

void divide(const Operation& op, std::byte* data, std::size_t num_bytes, int divisor) {
  if (op.request.op != ReduceOp::mean || num_bytes == 0) return;
  void* to[] = {data};
  const void* from[] = {data};
  reduce(op.request.dtype, ReduceOp::mean, to, 1, from, 1, num_bytes / size_of(op.request.dtype), divisor);
}

std::vector<Range> stripes(const HierarchicalGroup& group, std::size_t num_bytes) {
  const auto count = num_bytes <= one_stripe_bytes ? 1u : static_cast<std::size_t>(group.num_stripes());
  const std::size_t lines = (num_bytes + 63) / 64;
  std::vector<Range> parts(group.members(group.host()).size(), Range{num_bytes, 0});
  for (std::size_t k = 0; k < count; ++k) {
    const std::size_t start = std::min(lines * k / count * 64, num_bytes);
    parts[k] = {start, std::min(lines * (k + 1) / count * 64, num_bytes) - start};
  }
  return parts;
}

}  // namespace

Task hierarchical_combine(HierarchicalGroup& group, Operation& op) {
  const Request& request = op.request;
  const std::size_t total = request.numel * size_of(request.dtype);
  const bool gives_all = request.kind == OperationKind::all_reduce;
  const auto parts = stripes(group, total);
  const Range mine = parts[static_cast<std::size_t>(group.place())];
  std::vector<std::byte> room(gives_all ? 0 : mine.num_bytes);
  std::byte* const result = gives_all ? request.output + mine.offset : room.data();

  Request within = part_of(op, OperationKind::reduce_scatter, request.source, result, total);
  within.parts = parts;
  OperationPointer step = group.begin(group.local(), op, std::move(within));
  co_await Until([&] { return group.is_over(step); });
  if (mine.num_bytes > 0) {
    Request between = part_of(op, request.kind, result, result, mine.num_bytes);
    between.root = gives_all ? 0 : group.host_of(request.root);
    step = group.begin(*group.stripe(), op, std::move(between));
    co_await Until([&] { return group.is_over(step); });
    divide(op, result, mine.num_bytes, group.size());
  }
  if (!gives_all && group.host() != group.host_of(request.root)) co_return;
  Request back = part_of(op, gives_all ? OperationKind::all_gather : OperationKind::gather, result,
                         request.output, total);
  if (gives_all) {
    back.send = {{0, mine.num_bytes}};
    back.is_same_for_all = true;
  } else {
    back.root = group.place_of(request.root);
    back.send.assign(parts.size(), Range{});
    back.send[static_cast<std::size_t>(back.root)] = {0, mine.num_bytes};
  }
  if (gives_all || group.rank() == request.root) back.receive = parts;
  step = group.begin(group.local(), op, std::move(back));
  co_await Until([&] { return group.is_over(step); });
}

Task hierarchical_reduce_scatter(HierarchicalGroup& group, Operation& op) {
  const Request& request = op.request;
  const int rank = group.rank(), size = group.size();
  const auto part = [&](int p) { return request.parts[static_cast<std::size_t>(p)]; };
  const std::size_t own_bytes = part(rank).num_bytes;
  const auto holder = [&](int p) { return group.partner(p, group.host()); };  // on this host
  // Rooms: contributions of this host's ranks to the parts held here, then those of other hosts to this
  // rank's part.
  std::vector<std::size_t> held(static_cast<std::size_t>(size));
  std::size_t end = 0;
  for (int p = 0; p < size; ++p) {
    held[static_cast<std::size_t>(p)] = end;
    if (holder(p) == rank) end += (part(p).num_bytes + 63) / 64 * 64;
  }
  const std::size_t stride = (own_bytes + 63) / 64 * 64;
  std::unique_ptr<std::byte[]> room =
      std::make_unique_for_overwrite<std::byte[]>(end + stride * static_cast<std::size_t>(group.num_hosts()));

  std::vector<OperationPointer> steps;
  for (int p = 0; p < size; ++p) {
    std::byte* const to = holder(p) == rank ? room.get() + held[static_cast<std::size_t>(p)] : nullptr;
    Request within =
        part_of(op, OperationKind::reduce, request.source + part(p).offset, to, part(p).num_bytes);
    within.root = group.place_of(holder(p));
    steps.push_back(group.begin(group.local(), op, std::move(within)));
  }
  for (const OperationPointer& step : steps) co_await Until([&] { return group.is_over(step); });

  Request between = part_of(op, OperationKind::all_to_all, room.get(), room.get(), 0);
  between.send.assign(static_cast<std::size_t>(size), Range{});
  between.receive = between.send;
  for (int p = 0; p < size; ++p)
    if (group.host_of(p) != group.host() && holder(p) == rank)
      between.send[static_cast<std::size_t>(p)] = {held[static_cast<std::size_t>(p)], part(p).num_bytes};
  std::vector<const void*> from;
  for (int h = 0; h < group.num_hosts(); ++h) {
    const std::size_t at = end + stride * static_cast<std::size_t>(h);
    if (h != group.host())
      between.receive[static_cast<std::size_t>(group.partner(rank, h))] = {at, own_bytes};
    from.push_back(room.get() + (h == group.host() ? held[static_cast<std::size_t>(rank)] : at));
  }
  const OperationPointer step = group.begin(group.world(), op, std::move(between));
  co_await Until([&] { return group.is_over(step); });
  if (own_bytes == 0) co_return;
  void* to[] = {request.output};
  reduce(request.dtype, request.op, to, 1, from.data(), group.num_hosts(), own_bytes / size_of(request.dtype),
         size);
}

Task hierarchical_all_gather(HierarchicalGroup& group, Operation& op) {
  const Request& request = op.request;
  const int rank = group.rank(), size = group.size();
  const std::size_t whole = request.numel * size_of(request.dtype);
  const auto place = [&](int r) { return request.receive[static_cast<std::size_t>(r)]; };
  Request within = part_of(op, OperationKind::all_gather, request.source, request.output, whole);
  within.send = request.send;
  within.is_same_for_all = true;
  for (const int r : group.members(group.host())) within.receive.push_back(place(r));
  Request between = part_of(op, OperationKind::all_gather, request.source, request.output, whole);
  between.send.assign(static_cast<std::size_t>(size), Range{});
  between.receive = between.send;
  for (int h = 0; h < group.num_hosts(); ++h)
    if (h != group.host()) between.send[static_cast<std::size_t>(group.partner(rank, h))] = request.send[0];
  for (int r = 0; r < size; ++r)
    if (group.host_of(r) != group.host() && group.partner(r, group.host()) == rank)
      between.receive[static_cast<std::size_t>(r)] = place(r);
  const OperationPointer afar = group.begin(group.world(), op, std::move(between));
  std::vector<OperationPointer> near{group.begin(group.local(), op, std::move(within))};
  co_await Until([&] { return group.is_over(afar); });

  const std::size_t mates = group.members(group.host()).size();
  for (int r = 0; r < size && mates > 1; ++r) {
    if (group.host_of(r) == group.host() || place(r).num_bytes == 0) continue;
    const int root = group.place_of(group.partner(r, group.host()));
    Request pass = part_of(op, OperationKind::broadcast, request.output, request.output, place(r).num_bytes);
    pass.root = root;
    pass.is_same_for_all = true;
    if (root == group.place()) {
      pass.send = {place(r)};
    } else {
      pass.receive.assign(mates, Range{});
      pass.receive[static_cast<std::size_t>(root)] = place(r);
    }
    near.push_back(group.begin(group.local(), op, std::move(pass)));
  }
  for (const OperationPointer& step : near) co_await Until([&] { return group.is_over(step); });
}

Task hierarchical_broadcast(HierarchicalGroup& group, Operation& op) {
  const Request& request = op.request;
  const std::size_t total = request.numel * size_of(request.dtype);
  const bool is_root_here = group.host_of(request.root) == group.host();
  const auto spread = [&](Group& over, int root) {
    // A rank that passes data on reads what it has received; the root reads its source.
    const bool is_sender = over.rank() == root;
    const std::byte* source = group.rank() == request.root ? request.source : request.output;
    Request r = part_of(op, OperationKind::broadcast, source, request.output, total);
    r.root = root;
    r.is_same_for_all = true;
    if (is_sender) {
      r.send = {{0, total}};
    } else {
      r.receive.assign(static_cast<std::size_t>(over.size()), Range{});
      r.receive[static_cast<std::size_t>(root)] = {0, total};
    }
    return group.begin(over, op, std::move(r));
  };
  OperationPointer step;
  if (is_root_here) {
    step = spread(group.local(), group.place_of(request.root));
    co_await Until([&] { return group.is_over(step); });
  }
  if (group.place() == 0) {
    step = spread(*group.stripe(), group.host_of(request.root));
    co_await Until([&] { return group.is_over(step); });
  }
  if (is_root_here) co_return;
  step = spread(group.local(), 0);
  co_await Until([&] { return group.is_over(step); });
}

Task hierarchical_barrier(HierarchicalGroup& group, Operation& op) {
  OperationPointer step =
      group.begin(group.local(), op, part_of(op, OperationKind::barrier, nullptr, nullptr, 0));
  co_await Until([&] { return group.is_over(step); });
  if (group.place() == 0) {
    step = group.begin(*group.stripe(), op, part_of(op, OperationKind::barrier, nullptr, nullptr, 0));
    co_await Until([&] { return group.is_over(step); });
  }
  step = group.begin(group.local(), op, part_of(op, OperationKind::barrier, nullptr, nullptr, 0));
  co_await Until([&] { return group.is_over(step); });
}

Task hierarchical_exchange(HierarchicalGroup& group, Operation& op) {
  const Request& request = op.request;
  const auto all = static_cast<std::size_t>(group.size());
  const bool is_rooted = request.kind != OperationKind::all_to_all;
  Request within =
      part_of(op, request.kind, request.source, request.output, request.numel * size_of(request.dtype));
  Request between = within;
  between.root = request.root;
  // If the root is on another host there is nothing to do within this one, and any root will do.
  within.root = is_rooted && group.host_of(request.root) == group.host() ? group.place_of(request.root) : 0;
  const auto divide_table = [&](const std::vector<Range>& table, std::vector<Range>& near,
                                std::vector<Range>& afar) {
    if (table.empty()) return;
    afar.assign(all, Range{});
    for (std::size_t r = 0; r < all; ++r)
      if (group.host_of(static_cast<int>(r)) == group.host()) near.push_back(table[r]);
      else afar[r] = table[r];
  };
  divide_table(request.send, within.send, between.send);
  divide_table(request.receive, within.receive, between.receive);
  const OperationPointer afar = group.begin(group.world(), op, std::move(between));
  const OperationPointer near = group.begin(group.local(), op, std::move(within));
  co_await Until([&] { return group.is_over(afar) && group.is_over(near); });
}

}  // namespace paceline
