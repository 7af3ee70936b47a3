// The executor of lowered programs over a transport. Every lane of the plan is a coroutine, and messages
// travel in slices of a block. Receives are posted ahead into blocks, so that a peer's send never waits until
// this rank reaches the receive. Sends leave straight from the buffers where these are contiguous; an
// instruction that overwrites such a buffer waits until the send is done.
#include <algorithm>
#include <cstring>
#include <list>
#include <map>

#include "core/base/reduce.h"
#include "core/engine/engine.h"
#include "core/network/network_group.h"

namespace paceline {
namespace {

constexpr std::size_t slice_bytes = Blocks::block_bytes;
constexpr std::size_t posted_ahead = 4;  // slices per connection

struct Posted {
  Transfer transfer;
  Blocks::Block block;
};

// What one peer sends on one channel, in order.
struct SliceQueue {
  std::vector<std::size_t> sizes;  // bytes of every slice of the plan
  std::size_t next = 0;            // slices that a receive was posted for
  std::list<Posted> posted;        // those that have not been taken yet
};

struct Execution {
  NetworkGroup& group;
  Operation& op;
  const Plan& plan;
  std::byte* buffers[3];
  std::unique_ptr<std::byte[]> scratch;
  std::map<std::pair<int, int>, SliceQueue> incoming;  // by (peer, channel)
  std::list<Posted> sends;
  std::vector<bool> is_done;
  std::vector<Task> lanes;
  ReduceOp combine;
  std::size_t first_missing = 0;

  Execution(NetworkGroup& g, Operation& o) : group(g), op(o), plan(*o.request.plan) {
    scratch = std::make_unique_for_overwrite<std::byte[]>(plan.scratch_bytes);
    buffers[Plan::input] = const_cast<std::byte*>(op.request.source);
    buffers[Plan::output] = op.request.output;
    buffers[Plan::scratch] = scratch.get();
    is_done.assign(plan.instructions.size(), false);
    combine = op.request.op == ReduceOp::mean ? ReduceOp::sum : op.request.op;
    for (const Plan::Instruction& i : plan.instructions)
      if (i.recv_peer >= 0)
        for (std::size_t k = 0; k < num_slices(i); ++k)
          incoming[{i.recv_peer, i.channel}].sizes.push_back(
              std::min(i.num_bytes - k * slice_bytes, slice_bytes));
    for (auto& [key, queue] : incoming) post_ahead(key, queue);
  }
  ~Execution() {
    lanes.clear();
    for (auto& [key, queue] : incoming) drop(queue.posted);
    drop(sends);
  }
  void drop(std::list<Posted>& list) {
    for (Posted& p : list) {
      if (p.transfer.state == Transfer::State::pending) group.transport().cancel(p.transfer);
      group.blocks().give(std::move(p.block));
    }
  }

  // An empty message is one slice too: it tells the peer that something has happened.
  static std::size_t num_slices(const Plan::Instruction& i) {
    return std::max<std::size_t>(1, (i.num_bytes + slice_bytes - 1) / slice_bytes);
  }

  void check(const Transfer& t) const {
    if (t.state == Transfer::State::failed) throw Failed(group.explain(t));
  }

  void post_ahead(const std::pair<int, int>& key, SliceQueue& queue) {
    while (queue.posted.size() < posted_ahead && queue.next < queue.sizes.size()) {
      Posted& p = queue.posted.emplace_back();
      p.block = group.blocks().take();
      p.transfer.peer = group.world_rank(key.first);
      p.transfer.tag = group.collective_tag(op, key.second);
      p.transfer.data = p.block.get();
      p.transfer.num_bytes = queue.sizes[queue.next++];
      group.transport().post_receive(p.transfer);
    }
  }
  // When several messages are missing, the rank to blame is the one that the earliest instruction waits for:
  // the others may be late because of it.
  bool has_arrived(std::size_t index, int peer, int channel) {
    const Transfer& t = incoming[{peer, channel}].posted.front().transfer;
    check(t);
    if (t.state == Transfer::State::pending && index <= first_missing) {
      first_missing = index;
      op.waiting_for = peer;
    }
    return t.state == Transfer::State::done;
  }
  Blocks::Block take_arrived(int peer, int channel) {
    SliceQueue& queue = incoming[{peer, channel}];
    Blocks::Block block = std::move(queue.posted.front().block);
    queue.posted.pop_front();
    post_ahead({peer, channel}, queue);
    return block;
  }

  void send(int peer, int channel, std::byte* data, std::size_t num_bytes, Blocks::Block block) {
    Posted& p = sends.emplace_back();
    p.block = std::move(block);
    p.transfer.peer = group.world_rank(peer);
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

  // Calls f(pointer, offset in the slice, bytes) for the contiguous parts of bytes [at, at + n) of `ranges`.
  template <class F>
  void each(const Plan::Ranges& ranges, std::size_t at, std::size_t n, F f) const {
    std::size_t start = 0, done = 0;
    for (const Plan::BufferRange& range : ranges) {
      const std::size_t low = std::max(start, at), high = std::min(start + range.num_bytes, at + n);
      if (low < high) {
        f(buffers[range.buffer] + range.offset + (low - start), done, high - low);
        done += high - low;
      }
      start += range.num_bytes;
    }
  }
  void scatter(const Plan::Ranges& to, std::size_t at, std::size_t n, const std::byte* from) const {
    each(to, at, n, [&](std::byte* p, std::size_t o, std::size_t m) { std::memmove(p, from + o, m); });
  }
  void gather(const Plan::Ranges& from, std::size_t at, std::size_t n, std::byte* to) const {
    each(from, at, n, [&](const std::byte* p, std::size_t o, std::size_t m) { std::memcpy(to + o, p, m); });
  }
  // The bytes [at, at + n) of `ranges` if they lie next to one another, else null.
  std::byte* contiguous(const Plan::Ranges& ranges, std::size_t at, std::size_t n) const {
    std::byte* found = nullptr;
    int parts = 0;
    each(ranges, at, n, [&](std::byte* p, std::size_t, std::size_t) { found = p, ++parts; });
    return parts == 1 ? found : nullptr;
  }
  // incoming = local (op) incoming
  void reduce_into(std::byte* incoming, const Plan::Ranges& local, std::size_t at, std::size_t n) const {
    each(local, at, n, [&](const std::byte* p, std::size_t o, std::size_t m) {
      void* to[] = {incoming + o};
      const void* from[] = {p, incoming + o};
      reduce(op.request.dtype, combine, to, 1, from, 2, m / size_of(op.request.dtype), 1);
    });
  }
  // Whether nothing that is still being sent lies in bytes [at, at + n) of `ranges`.
  bool is_writable(const Plan::Ranges& ranges, std::size_t at, std::size_t n) const {
    bool free = true;
    each(ranges, at, n, [&](const std::byte* p, std::size_t, std::size_t m) {
      for (const Posted& s : sends)
        free &= s.block || s.transfer.data + s.transfer.num_bytes <= p || p + m <= s.transfer.data;
    });
    return free;
  }

  bool can_start(const Plan::Instruction& i) const {
    return std::all_of(i.deps.begin(), i.deps.end(),
                       [&](int j) { return is_done[static_cast<std::size_t>(j)]; });
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
      if (i.recv_peer >= 0) {
        co_await Until([&] { return e.has_arrived(index, i.recv_peer, i.channel); });
        block = e.take_arrived(i.recv_peer, i.channel);
      } else if (i.verb != Verb::send || !(n == 0 || e.contiguous(i.src, at, n))) {
        block = e.group.blocks().take();
        e.gather(i.verb == Verb::reduce ? i.operand : i.src, at, n, block.get());
      }
      if (i.verb == Verb::recv_reduce || i.verb == Verb::recv_reduce_send || i.verb == Verb::reduce)
        e.reduce_into(block.get(), i.src, at, n);
      if (!i.dst.empty()) {
        co_await Until([&] { return e.is_writable(i.dst, at, n); });
        e.scatter(i.dst, at, n, block.get());
      }
      if (i.send_peer >= 0) {
        std::byte* data = block ? block.get() : e.contiguous(i.src, at, n);
        e.send(i.send_peer, i.channel, data, n, std::move(block));
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
