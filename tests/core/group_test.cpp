// Ranks as threads of one process over shared memory: every family of operations in its small, in-place and
// staged form, asynchronous ones, messages, several groups.
#include <barrier>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "core/shared_memory/shared_memory_group.h"
#include "rank.h"

namespace {

using namespace paceline;

void run(Rank rank) {
  Arena& arena = rank.process.memory.arena();
  const std::size_t large = 300'007;
  auto* shared = static_cast<float*>(arena.allocate(large * 4));
  std::vector<float> priv(large), out(large * rank.num_ranks());
  for (int round = 0; round < 6; ++round) {
    for (const std::size_t n : {std::size_t{1}, std::size_t{1000}, large}) {
      rank.all_reduce(priv.data(), n);
      rank.all_reduce(shared, n);
      for (std::size_t i = 0; i < n; ++i) shared[i] = priv[i] = static_cast<float>(rank.rank);
      rank.all_gather(priv.data(), out.data(), n);
      rank.all_gather(shared, out.data(), n);
    }
    for (const std::size_t n : {std::size_t{11}, std::size_t{50'000}}) rank.every_operation(n);
    rank.messages(3);
    rank.messages(30'000);
    rank.asynchronous();
  }
  arena.free(shared);
}

void test(int size) {
  constexpr int num_groups = 2;
  std::vector<std::vector<OutboxAddress>> addresses(
      num_groups, std::vector<OutboxAddress>(static_cast<std::size_t>(size)));
  std::barrier meet(size);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank)
    threads.emplace_back([&, rank] {
      Process process;
      Engine& engine = process.engine;
      engine.set_ranks_on_host(1000);
      std::vector<std::unique_ptr<SharedMemoryGroup>> groups;
      for (auto& list : addresses) {
        groups.push_back(std::make_unique<SharedMemoryGroup>(engine, process.memory, rank, size));
        list[static_cast<std::size_t>(rank)] = groups.back()->address();
      }
      meet.arrive_and_wait();
      for (std::size_t g = 0; g < groups.size(); ++g)
        engine.locked([&] { groups[g]->connect(addresses[g]); });
      meet.arrive_and_wait();
      // The second group belongs to a second thread of the rank.
      std::thread second([&] { run({rank, size, process, *groups[1]}); });
      run({rank, size, process, *groups[0]});
      second.join();
      for (auto& group : groups) engine.close(std::move(group));
      meet.arrive_and_wait();
      CHECK(engine.num_closing_groups() == 0);
      CHECK(process.memory.arena().allocated_bytes() == 0);
      meet.arrive_and_wait();
      engine.stop();
      meet.arrive_and_wait();  // arenas of other ranks are in use until all are done
    });
  for (auto& t : threads) t.join();
}

}  // namespace

int main() {
  for (const int size : {1, 2, 3}) test(size);
  std::puts("ok");
}
