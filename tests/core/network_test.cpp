// Ranks as threads of one process over TCP, alone and mixed with shared memory: direct operations, programs, messages,
// asynchronous work from two threads, a rank that leaves early, a rank that gives up. Made for the sanitizers.
#include <barrier>
#include <cstdio>
#include <set>

#include "core/engine.h"
#include "core/mixed_group.h"
#include "core/network_group.h"
#include "mesh.h"

using namespace paceline;

namespace {

constexpr Nanoseconds timeout = 60 * second_ns;

struct Rank {
  int rank, size;
  Engine& engine;
  Session& group;

  void finish(const OperationPointer& op) {
    CHECK(engine.wait(*op, -1));
    CHECK(!op->failure);
  }
  OperationPointer submit(Request r) { return engine.submit(group, std::move(r), timeout); }
  static Request request(Kind kind, const float* source, float* output, std::size_t numel) {
    Request r;
    r.kind = kind;
    r.dtype = DType::float32;
    r.source = reinterpret_cast<const std::byte*>(source);
    r.output = reinterpret_cast<std::byte*>(output);
    r.numel = numel;
    return r;
  }
  std::vector<Range> blocks(std::size_t n) const {
    std::vector<Range> out;
    for (int p = 0; p < size; ++p) out.push_back({static_cast<std::size_t>(p) * n * 4, n * 4});
    return out;
  }

  void combine(std::size_t n) {
    std::vector<float> x(n, static_cast<float>(rank + 1)), out(n);
    const float total = static_cast<float>(size * (size + 1) / 2);
    finish(submit(request(Kind::all_reduce, x.data(), out.data(), n)));
    for (const float v : out) CHECK(v == total);
    Request r = request(Kind::reduce, x.data(), out.data(), n);
    r.root = size - 1;
    finish(submit(r));
    if (rank == size - 1)
      for (const float v : out) CHECK(v == total);
    std::vector<float> all(n * static_cast<std::size_t>(size), static_cast<float>(rank + 1));
    r = request(Kind::reduce_scatter, all.data(), out.data(), all.size());
    r.parts = blocks(n);
    finish(submit(r));
    for (const float v : out) CHECK(v == total);
  }

  void exchange(std::size_t n) {
    const auto me = static_cast<std::size_t>(rank);
    std::vector<float> x(n, static_cast<float>(rank)), all(n * static_cast<std::size_t>(size), -1);
    Request r = request(Kind::all_gather, x.data(), all.data(), n);
    r.is_same_for_all = true, r.send = {{0, n * 4}}, r.receive = blocks(n);
    finish(submit(r));
    for (std::size_t i = 0; i < all.size(); ++i) CHECK(all[i] == static_cast<float>(i / n));
    std::vector<float> out(all.size());
    r = request(Kind::all_to_all, all.data(), out.data(), n);
    r.send = r.receive = blocks(n);
    finish(submit(r));
    for (const float v : out) CHECK(v == static_cast<float>(rank));
    r = request(Kind::broadcast, x.data(), x.data(), n);
    r.root = size - 1, r.is_same_for_all = true;
    if (rank == r.root) r.send = {{0, n * 4}};
    else r.receive.assign(static_cast<std::size_t>(size), Range{}), r.receive.back() = {0, n * 4};
    finish(submit(r));
    for (const float v : x) CHECK(v == static_cast<float>(size - 1));
    r = request(Kind::gather, &x[0], out.data(), n);
    r.send.assign(static_cast<std::size_t>(size), Range{});
    r.send[0] = {0, n * 4};
    if (rank == 0) r.receive = blocks(n);
    finish(submit(r));
    if (rank == 0)
      for (const float v : out) CHECK(v == static_cast<float>(size - 1));
    (void)me;
  }

  void messages(std::size_t n) {
    std::vector<float> x(n, static_cast<float>(rank)), in(n);
    Request s = request(Kind::send, x.data(), nullptr, n), r = request(Kind::receive, nullptr, in.data(), n);
    s.root = (rank + 1) % size, r.root = (rank + size - 1) % size;
    const OperationPointer sent = submit(s), got = submit(r);
    finish(got), finish(sent);
    for (const float v : in) CHECK(v == static_cast<float>(r.root));
  }

  void asynchronous() {
    std::vector<std::vector<float>> data;
    std::vector<OperationPointer> ops;
    for (std::size_t i = 0; i < 9; ++i) {
      data.emplace_back(i % 3 == 2 ? 200'000u : 10u, static_cast<float>(rank));
      ops.push_back(submit(request(Kind::all_reduce, data[i].data(), data[i].data(), data[i].size())));
    }
    for (std::size_t i = ops.size(); i-- > 0;) finish(ops[i]);
    for (const auto& d : data)
      for (const float v : d) CHECK(v == static_cast<float>(size * (size - 1) / 2));
  }

  // Everybody's block travels once round the ring, as a program of sends and receives.
  void program(std::size_t n) {
    std::vector<float> x(n, static_cast<float>(rank)), out(n);
    const auto bytes = static_cast<std::int64_t>(n * 4);
    const int next = (rank + 1) % size, previous = (rank + size - 1) % size;
    const auto verb = [](Verb v) { return static_cast<std::int64_t>(v); };
    Request r = request(Kind::all_to_all, x.data(), out.data(), n);
    r.plan = std::make_shared<Plan>(Plan::parse({0, 0, 2, 2, verb(Verb::send), 0, 0, -1, next, bytes, 0, 1, 0, 0, 0, 0, bytes,
                                                 verb(Verb::receive), 1, 0, previous, -1, bytes, 1, 0, 0, 0, 1, 0, bytes},
                                                size));
    finish(submit(r));
    for (const float v : out) CHECK(v == static_cast<float>(previous));
  }

  void run(bool has_programs) {
    for (int round = 0; round < 3; ++round) {
      for (const std::size_t n : {1u, 1000u, 150'007u}) {
        combine(n);
        exchange(n);
        messages(n);
        if (has_programs) program(n);
      }
      asynchronous();
      finish(submit(request(Kind::barrier, nullptr, nullptr, 0)));
    }
  }
};

// Runs `body(rank, engine, network, local)` as threads; `hosts[r]` is rank r's host.
template <class F>
void run_job(const std::vector<int>& hosts, F body) {
  const int size = static_cast<int>(hosts.size());
  Mesh mesh(size);
  std::vector<Address> addresses(hosts.size());
  std::barrier meet(size);
  run_ranks(size, [&](int rank) {
    Engine engine;
    engine.set_ranks_on_host(1000);
    std::shared_ptr<Transport> transport = std::move(mesh.ranks[static_cast<std::size_t>(rank)]);
    engine.add(transport);
    std::vector<int> mates;
    for (int r = 0; r < size; ++r)
      if (hosts[static_cast<std::size_t>(r)] == hosts[static_cast<std::size_t>(rank)]) mates.push_back(r);
    const auto place = static_cast<int>(std::ranges::find(mates, rank) - mates.begin());
    auto local = std::make_unique<Group>(engine, place, static_cast<int>(mates.size()));
    addresses[static_cast<std::size_t>(rank)] = local->address();
    meet.arrive_and_wait();
    std::vector<Address> near;
    for (const int r : mates) near.push_back(addresses[static_cast<std::size_t>(r)]);
    engine.connect(*local, near);
    meet.arrive_and_wait();
    body(rank, engine, transport, *local, mates);
    engine.close(std::move(local));
    meet.arrive_and_wait();
    engine.remove(transport);
    engine.stop();
    meet.arrive_and_wait();
  });
}

std::unique_ptr<NetworkGroup> join(Engine& engine, const std::shared_ptr<Transport>& transport, std::uint32_t id, int rank,
                                   const std::vector<int>& ranks) {
  auto group = std::make_unique<NetworkGroup>(engine, transport, id, rank, ranks);
  engine.locked([&] { group->watch(); });
  return group;
}

std::vector<int> everybody(int size) {
  std::vector<int> all;
  for (int r = 0; r < size; ++r) all.push_back(r);
  return all;
}

}  // namespace

CASE(over_the_network) {
  for (const int size : {2, 3})
    run_job(everybody(size), [&](int rank, Engine& engine, const auto& transport, Group&, const auto&) {
      auto first = join(engine, transport, 0, rank, everybody(size)), second = join(engine, transport, 1, rank, everybody(size));
      std::thread other([&] { Rank{rank, size, engine, *second}.run(true); });
      Rank{rank, size, engine, *first}.run(true);
      other.join();
      engine.close(std::unique_ptr<Session>(std::move(second)));
      engine.close(std::unique_ptr<Session>(std::move(first)));
    });
}

CASE(mixed) {
  for (const std::vector<int>& hosts : {std::vector<int>{0, 0, 1}, {0, 1, 0, 1}})
    run_job(hosts, [&](int rank, Engine& engine, const auto& transport, Group& local, const auto&) {
      const int size = static_cast<int>(hosts.size());
      auto world = join(engine, transport, 0, rank, everybody(size));
      std::vector<int> stripe_ranks;
      const int place = local.rank();
      for (const int h : {0, 1}) {
        std::vector<int> members;
        for (int r = 0; r < size; ++r)
          if (hosts[static_cast<std::size_t>(r)] == h) members.push_back(r);
        if (place < static_cast<int>(members.size())) stripe_ranks.push_back(members[static_cast<std::size_t>(place)]);
      }
      std::unique_ptr<NetworkGroup> stripe;
      if (stripe_ranks.size() == 2)
        stripe = join(engine, transport, 1, stripe_ranks[0] == rank ? 0 : 1, stripe_ranks);
      auto mixed = std::make_unique<MixedGroup>(engine, rank, hosts, local, *world, stripe.get());
      Rank{rank, size, engine, *mixed}.run(false);
      engine.close(std::unique_ptr<Session>(std::move(mixed)));
      if (stripe) engine.close(std::unique_ptr<Session>(std::move(stripe)));
      engine.close(std::unique_ptr<Session>(std::move(world)));
    });
}

// Rank 2 waits for rank 0 when rank 1 has done its part and is gone.
CASE(leaving_early_is_no_loss) {
  std::barrier meet(3);
  run_job(everybody(3), [&](int rank, Engine& engine, const auto& transport, Group&, const auto&) {
    auto group = join(engine, transport, 0, rank, everybody(3));
    Rank me{rank, 3, engine, *group};
    me.finish(me.submit(Rank::request(Kind::barrier, nullptr, nullptr, 0)));
    std::vector<float> x(1000, 1.0f), out(3000);
    Request r = Rank::request(Kind::gather, x.data(), out.data(), 1000);
    r.root = 2, r.send.assign(3, Range{}), r.send[2] = {0, 4000};
    if (rank == 2) r.receive = me.blocks(1000);
    if (rank == 0) ::usleep(300'000);
    const OperationPointer op = me.submit(r);
    if (rank == 1) {
      me.finish(op);
      engine.close(std::unique_ptr<Session>(std::move(group)));
      engine.remove(transport);
    }
    if (rank != 1) me.finish(op);
    if (group) engine.close(std::unique_ptr<Session>(std::move(group)));
  });
}

CASE(whoever_gives_up_says_why) {
  run_job(everybody(3), [&](int rank, Engine& engine, const auto& transport, Group&, const auto&) {
    auto group = join(engine, transport, 0, rank, everybody(3));
    Rank me{rank, 3, engine, *group};
    me.finish(me.submit(Rank::request(Kind::barrier, nullptr, nullptr, 0)));
    if (rank != 1) {
      std::vector<float> x(100'000, 1.0f);
      const OperationPointer op = engine.submit(*group, Rank::request(Kind::all_reduce, x.data(), x.data(), x.size()),
                                                rank == 0 ? second_ns / 5 : timeout);
      CHECK(engine.wait(*op, -1));
      CHECK(op->failure.kind == FailureKind::timeout && op->failure.rank == 1);
    } else {
      ::usleep(600'000);
    }
    engine.close(std::unique_ptr<Session>(std::move(group)));
  });
}

int main(int argc, char** argv) { return run_cases(argc, argv); }
