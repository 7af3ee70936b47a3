// The executor of lowered programs over a transport. Every lane of the plan is a coroutine; messages travel in slices
// of a block. Receives are posted ahead into blocks, so sends never wait for this rank to get to its receive; sends
// leave straight from the buffers where these are contiguous, and whoever wants to overwrite them waits.
#include <algorithm>
#include <cstring>
#include <list>
#include <map>

#include "core/engine/engine.h"
#include "core/network/network_group.h"
#include "core/base/reduce.h"

namespace paceline {
namespace {

constexpr std::size_t slice_bytes = Blocks::block_bytes;
constexpr std::size_t posted_ahead = 4;  // slices per connection

struct Posted {
  Transfer transfer;
  Blocks::Block block;
};

// The slices that one peer sends on one channel, in order.
struct Connection {
  std::vector<std::size_t> slices;
  std::size_t next = 0;
  std::list<Posted> posted;
};

struct Execution {
  NetworkGroup& group;
  Operation& op;
  const Plan& plan;
  std::byte* memory[3];
  std::unique_ptr<std::byte[]> scratch;
  std::map<std::pair<int, int>, Connection> connections;
  std::list<Posted> sends;
  std::vector<bool> is_done;
  std::vector<Task> lanes;
  ReduceOp combine;
  std::size_t first_missing = 0;

  Execution(NetworkGroup& g, Operation& o) : group(g), op(o), plan(*o.request.plan) {
    scratch = std::make_unique_for_overwrite<std::byte[]>(plan.scratch_bytes);
    memory[Plan::input] = const_cast<std::byte*>(op.request.source);
    memory[Plan::output] = op.request.output;
    memory[Plan::scratch] = scratch.get();
    is_done.assign(plan.instructions.size(), false);
    combine = op.request.op == ReduceOp::mean ? ReduceOp::sum : op.request.op;
    for (const Plan::Instruction& i : plan.instructions)
      if (i.from >= 0)
        for (std::size_t k = 0; k < num_slices(i); ++k)
          connections[{i.from, i.channel}].slices.push_back(std::min(i.num_bytes - k * slice_bytes, slice_bytes));
    for (auto& [key, connection] : connections) post_ahead(key, connection);
  }
  ~Execution() {
    lanes.clear();
    for (auto& [key, connection] : connections) drop(connection.posted);
    drop(sends);
  }
  void drop(std::list<Posted>& list) {
    for (Posted& p : list) {
      if (p.transfer.state == Transfer::State::pending) group.transport().cancel(p.transfer);
      group.blocks().give(std::move(p.block));
    }
  }

  // An empty message is one slice too: it tells that something has happened.
  static std::size_t num_slices(const Plan::Instruction& i) {
    return std::max<std::size_t>(1, (i.num_bytes + slice_bytes - 1) / slice_bytes);
  }

  void check(const Transfer& t) const {
    if (t.state == Transfer::State::failed) throw Failed(group.explain(t));
  }

  void post_ahead(const std::pair<int, int>& key, Connection& c) {
    while (c.posted.size() < posted_ahead && c.next < c.slices.size()) {
      Posted& p = c.posted.emplace_back();
      p.block = group.blocks().take();
      p.transfer.peer = group.world_rank(key.first);
      p.transfer.tag = group.collective_tag(op, key.second);
      p.transfer.data = p.block.get();
      p.transfer.num_bytes = c.slices[c.next++];
      group.transport().post_receive(p.transfer);
    }
  }
  // Of all that is missing, blame falls on what the earliest instruction waits for: the rest may follow from it.
  bool has_arrived(std::size_t index, int from, int channel) {
    const Transfer& t = connections[{from, channel}].posted.front().transfer;
    check(t);
    if (t.state == Transfer::State::pending && index <= first_missing) {
      first_missing = index;
      op.waiting_for = from;
    }
    return t.state == Transfer::State::done;
  }
  Blocks::Block take_arrived(int from, int channel) {
    Connection& c = connections[{from, channel}];
    Blocks::Block block = std::move(c.posted.front().block);
    c.posted.pop_front();
    post_ahead({from, channel}, c);
    return block;
  }

  void send(int to, int channel, std::byte* data, std::size_t num_bytes, Blocks::Block block) {
    Posted& p = sends.emplace_back();
    p.block = std::move(block);
    p.transfer.peer = group.world_rank(to);
    p.transfer.tag = group.collective_tag(op, channel);
    p.transfer.data = data;
    p.transfer.num_bytes = num_bytes;
    group.transport().post_send(p.transfer);
  }
  void reap() {
    for (auto it = sends.begin(); it != sends.end();) {
      check(it->transfer);
      if (it->transfer.state == Transfer::State::pending) {
        ++it;
        continue;
      }
      group.blocks().give(std::move(it->block));
      it = sends.erase(it);
      group.did_move = true;
    }
  }

  // Calls f(pointer, offset in the slice, bytes) for the contiguous parts of [at, at + n) of `pieces`.
  template <class F>
  void each(const Plan::Pieces& pieces, std::size_t at, std::size_t n, F f) const {
    std::size_t start = 0, done = 0;
    for (const Plan::Piece& p : pieces) {
      const std::size_t low = std::max(start, at), high = std::min(start + p.num_bytes, at + n);
      if (low < high) {
        f(memory[p.memory] + p.offset + (low - start), done, high - low);
        done += high - low;
      }
      start += p.num_bytes;
    }
  }
  void scatter(const Plan::Pieces& to, std::size_t at, std::size_t n, const std::byte* from) const {
    each(to, at, n, [&](std::byte* p, std::size_t o, std::size_t m) { std::memmove(p, from + o, m); });
  }
  void gather(const Plan::Pieces& from, std::size_t at, std::size_t n, std::byte* to) const {
    each(from, at, n, [&](const std::byte* p, std::size_t o, std::size_t m) { std::memcpy(to + o, p, m); });
  }
  std::byte* contiguous(const Plan::Pieces& pieces, std::size_t at, std::size_t n) const {
    std::byte* found = nullptr;
    int parts = 0;
    each(pieces, at, n, [&](std::byte* p, std::size_t, std::size_t) { found = p, ++parts; });
    return parts == 1 ? found : nullptr;
  }
  // incoming = local (op) incoming
  void reduce_into(std::byte* incoming, const Plan::Pieces& local, std::size_t at, std::size_t n) const {
    each(local, at, n, [&](const std::byte* p, std::size_t o, std::size_t m) {
      void* to[] = {incoming + o};
      const void* from[] = {p, incoming + o};
      reduce(op.request.dtype, combine, to, 1, from, 2, m / size_of(op.request.dtype), 1);
    });
  }
  // Whether nothing that is still being sent lies in [at, at + n) of `pieces`.
  bool is_writable(const Plan::Pieces& pieces, std::size_t at, std::size_t n) const {
    bool free = true;
    each(pieces, at, n, [&](const std::byte* p, std::size_t, std::size_t m) {
      for (const Posted& s : sends)
        free &= s.block || s.transfer.data + s.transfer.num_bytes <= p || p + m <= s.transfer.data;
    });
    return free;
  }

  bool can_start(const Plan::Instruction& i) const {
    return std::all_of(i.after.begin(), i.after.end(), [&](int j) { return is_done[static_cast<std::size_t>(j)]; });
  }

  bool advance() {
    reap();
    first_missing = plan.instructions.size();
    bool all = true;
    for (Task& lane : lanes) {
      while (!lane.is_done() && lane.step()) group.did_move = true;
      all &= lane.is_done();
    }
    return all && sends.empty();
  }
};

Task run_lane(Execution& e, int lane) {
  for (std::size_t index = 0; index < e.plan.instructions.size(); ++index) {
    const Plan::Instruction& i = e.plan.instructions[index];
    if (i.lane != lane) continue;
    co_await Until([&] { return e.can_start(i); });
    for (std::size_t k = 0; k < Execution::num_slices(i); ++k) {
      const std::size_t at = k * slice_bytes, n = std::min(i.num_bytes - at, slice_bytes);
      Blocks::Block block;
      if (i.from >= 0) {
        co_await Until([&] { return e.has_arrived(index, i.from, i.channel); });
        block = e.take_arrived(i.from, i.channel);
      } else if (i.verb != Verb::send || !(n == 0 || e.contiguous(i.source, at, n))) {
        block = e.group.blocks().take();
        e.gather(i.verb == Verb::reduce ? i.other : i.source, at, n, block.get());
      }
      if (i.verb == Verb::receive_reduce || i.verb == Verb::receive_reduce_send || i.verb == Verb::reduce)
        e.reduce_into(block.get(), i.source, at, n);
      if (!i.destination.empty()) {
        co_await Until([&] { return e.is_writable(i.destination, at, n); });
        e.scatter(i.destination, at, n, block.get());
      }
      if (i.to >= 0) {
        std::byte* data = block ? block.get() : e.contiguous(i.source, at, n);
        e.send(i.to, i.channel, data, n, std::move(block));
      }
      e.group.blocks().give(std::move(block));
    }
    e.is_done[index] = true;
  }
}

}  // namespace

Task execute(NetworkGroup& group, Operation& op) {
  Execution e(group, op);
  for (int lane = 0; lane < e.plan.num_lanes; ++lane) e.lanes.push_back(run_lane(e, lane));
  if (op.is_heavy) co_await Pause();
  co_await Until([&] { return e.advance(); });
  if (op.request.op == ReduceOp::mean && e.plan.output_bytes > 0) {
    void* to[] = {op.request.output};
    const void* from[] = {op.request.output};
    reduce(op.request.dtype, ReduceOp::mean, to, 1, from, 1, e.plan.output_bytes / size_of(op.request.dtype),
           group.size());
  }
}

}  // namespace paceline
