// Ranks as threads of one process over shared memory: every family of operations in its small, in-place and staged
// form, asynchronous ones, messages, several groups. Made for the sanitizers.
#include <barrier>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "core/engine.h"

namespace {

using namespace paceline;

constexpr Nanoseconds timeout = 60 * second_ns;

struct Rank {
  int rank, size;
  Engine& engine;
  Group& group;
  std::vector<OperationPointer> flying{};

  void finish(const OperationPointer& op) {
    CHECK(engine.wait(*op, -1));
    CHECK(!op->failure);
  }
  OperationPointer submit(Request r) { return engine.submit(group, std::move(r), timeout); }

  Request request(Kind kind, const float* source, float* output, std::size_t numel) {
    Request r;
    r.kind = kind;
    r.dtype = DType::float32;
    r.source = reinterpret_cast<const std::byte*>(source);
    r.output = reinterpret_cast<std::byte*>(output);
    r.numel = numel;
    return r;
  }

  void all_reduce(float* x, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) x[i] = static_cast<float>(rank + 1) * static_cast<float>(i % 7);
    finish(submit(request(Kind::all_reduce, x, x, n)));
    const float ranks = static_cast<float>(size * (size + 1) / 2);
    for (std::size_t i = 0; i < n; ++i) CHECK(x[i] == ranks * static_cast<float>(i % 7));
  }

  void all_gather(const float* x, float* out, std::size_t n) {
    Request r = request(Kind::all_gather, x, out, n);
    r.is_same_for_all = true;
    r.send = {{0, n * 4}};
    for (int p = 0; p < size; ++p) r.receive.push_back({static_cast<std::size_t>(p) * n * 4, n * 4});
    finish(submit(r));
    for (int p = 0; p < size; ++p)
      for (std::size_t i = 0; i < n; ++i) CHECK(out[static_cast<std::size_t>(p) * n + i] == static_cast<float>(p));
  }

  void all_to_all(std::size_t n) {
    std::vector<float> x(n * static_cast<std::size_t>(size)), out(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(rank * 100) + static_cast<float>(i / n);
    Request r = request(Kind::all_to_all, x.data(), out.data(), n);
    for (int p = 0; p < size; ++p) r.send.push_back({static_cast<std::size_t>(p) * n * 4, n * 4});
    r.receive = r.send;
    finish(submit(r));
    for (std::size_t i = 0; i < x.size(); ++i)
      CHECK(out[i] == static_cast<float>(i / n) * 100 + static_cast<float>(rank));
  }

  void messages(std::size_t n) {
    std::vector<float> x(n, static_cast<float>(rank)), a(n), b(n);
    Request s = request(Kind::send, x.data(), nullptr, n), r = request(Kind::receive, nullptr, a.data(), n);
    s.root = (rank + 1) % size;
    r.root = (rank + size - 1) % size;
    r.tag = 1;
    Request second = r;
    second.output = reinterpret_cast<std::byte*>(b.data());
    second.root = -1;
    second.tag = 0;
    const OperationPointer first = submit(s);
    s.tag = 1;
    const OperationPointer next = submit(s), got = submit(r), any = submit(second);
    for (const OperationPointer& op : {any, got, next, first}) finish(op);
    for (std::size_t i = 0; i < n; ++i) CHECK(a[i] == static_cast<float>(r.root) && a[i] == b[i]);
  }

  void asynchronous() {
    std::vector<std::vector<float>> data;
    std::vector<OperationPointer> ops;
    for (std::size_t i = 0; i < 12; ++i) {
      data.emplace_back(i % 3 == 2 ? 200'000u : 10u, static_cast<float>(rank));
      ops.push_back(submit(request(Kind::all_reduce, data[i].data(), data[i].data(), data[i].size())));
    }
    for (std::size_t i = ops.size(); i-- > 0;) finish(ops[i]);
    for (const auto& d : data)
      for (const float v : d) CHECK(v == static_cast<float>(size * (size - 1) / 2));
  }

  void run() {
    Arena& arena = engine.arena();
    const std::size_t large = 300'007;
    auto* shared = static_cast<float*>(arena.allocate(large * 4));
    std::vector<float> priv(large), out(large * static_cast<std::size_t>(size));
    for (int round = 0; round < 6; ++round) {
      for (const std::size_t n : {std::size_t{1}, std::size_t{1000}, large}) {
        all_reduce(priv.data(), n);
        all_reduce(shared, n);
        for (std::size_t i = 0; i < n; ++i) shared[i] = priv[i] = static_cast<float>(rank);
        all_gather(priv.data(), out.data(), n);
        all_gather(shared, out.data(), n);
      }
      all_to_all(11);
      all_to_all(50'000);
      messages(3);
      messages(30'000);
      asynchronous();
      finish(submit(request(Kind::barrier, nullptr, nullptr, 0)));
    }
    arena.free(shared);
  }
};

void test(int size) {
  constexpr int num_groups = 2;
  std::vector<std::vector<Address>> addresses(num_groups, std::vector<Address>(static_cast<std::size_t>(size)));
  std::barrier meet(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      Engine engine;
      engine.set_ranks_on_host(1000);
      std::vector<std::unique_ptr<Group>> groups;
      for (auto& list : addresses) {
        groups.push_back(std::make_unique<Group>(engine, rank, size));
        list[static_cast<std::size_t>(rank)] = groups.back()->address();
      }
      meet.arrive_and_wait();
      for (std::size_t g = 0; g < groups.size(); ++g) engine.connect(*groups[g], addresses[g]);
      meet.arrive_and_wait();
      // The second group belongs to a second thread of the rank.
      std::thread second([&] { Rank{rank, size, engine, *groups[1]}.run(); });
      Rank{rank, size, engine, *groups[0]}.run();
      second.join();
      for (auto& group : groups) engine.close(std::move(group));
      meet.arrive_and_wait();
      CHECK(engine.num_closing_groups() == 0);
      CHECK(engine.arena().allocated_bytes() == 0);
      meet.arrive_and_wait();
      engine.stop();
      meet.arrive_and_wait();  // arenas of other ranks are reached until everybody is done
    });
  for (auto& t : threads) t.join();
}

}  // namespace

int main() {
  for (const int size : {1, 2, 3}) test(size);
  std::puts("ok");
}
