// Ranks as threads of one process, each with an engine and a transport: every operation of NetworkGroup and
// of HierarchicalGroup, lowered programs, several groups and asynchronous operations at once; ranks that stay
// away, stop or leave.
#include <atomic>
#include <barrier>

#include "core/hierarchical/hierarchical_group.h"
#include "core/tcp/tcp_transport.h"
#include "mesh.h"
#include "rank.h"

namespace {

using namespace paceline;

// What the ranks exchange before they are connected, and where they meet.
struct Meeting {
  std::vector<int> hosts;
  std::vector<std::string> endpoints;
  std::vector<OutboxAddress> addresses;
  std::barrier<> together;

  explicit Meeting(std::vector<int> h)
      : hosts(std::move(h)), endpoints(hosts.size()), addresses(hosts.size()), together(size()) {}
  int size() const { return static_cast<int>(hosts.size()); }
};

// One rank's side: a group over the network and, if hosts have several ranks, one that shares memory within
// them.
struct Member {
  Meeting& meeting;
  int rank;
  Process process{};
  Engine& engine = process.engine;
  std::shared_ptr<TcpTransport> transport{};
  std::unique_ptr<SharedMemoryGroup> local{};
  std::unique_ptr<NetworkGroup> world{}, stripe{};
  std::unique_ptr<HierarchicalGroup> hierarchical{};

  Member(Meeting& m, int r) : meeting(m), rank(r) {
    engine.set_ranks_on_host(1000);
    TcpOptions options;
    options.rank = rank, options.size = meeting.size(), options.secret = bytes_of("secret");
    transport = std::make_shared<TcpTransport>(options);
    at(meeting.endpoints) = transport->endpoints();
    const std::vector<int> mates = members(meeting.hosts[static_cast<std::size_t>(rank)]);
    const int place = static_cast<int>(std::ranges::find(mates, rank) - mates.begin());
    local =
        std::make_unique<SharedMemoryGroup>(engine, process.memory, place, static_cast<int>(mates.size()));
    at(meeting.addresses) = local->address();
    meeting.together.arrive_and_wait();
    transport->set_peers(meeting.endpoints);
    engine.add(transport);
    std::vector<OutboxAddress> near;
    for (const int mate : mates) near.push_back(meeting.addresses[static_cast<std::size_t>(mate)]);
    engine.locked([&] { local->connect(near); });
    std::vector<int> all_ranks, peers;
    for (int p = 0; p < meeting.size(); ++p) all_ranks.push_back(p);
    world = network_group(0, rank, all_ranks);
    bool is_striped = true;
    const int num_hosts = *std::ranges::max_element(meeting.hosts) + 1;
    for (int h = 0; h < num_hosts; ++h) {
      const std::vector<int> others = members(h);
      is_striped &= others.size() > static_cast<std::size_t>(place);
      if (is_striped) peers.push_back(others[static_cast<std::size_t>(place)]);
    }
    if (is_striped) stripe = network_group(1 << 30, meeting.hosts[static_cast<std::size_t>(rank)], peers);
    engine.locked([&] {
      hierarchical =
          std::make_unique<HierarchicalGroup>(engine, rank, meeting.hosts, *local, *world, stripe.get());
    });
  }

  std::unique_ptr<NetworkGroup> network_group(std::uint32_t id, int own, std::vector<int> ranks) {
    auto group = std::make_unique<NetworkGroup>(engine, transport, id, own, std::move(ranks));
    engine.locked([&] { group->watch(); });
    return group;
  }
  std::vector<int> members(int host) const {
    std::vector<int> found;
    for (int r = 0; r < meeting.size(); ++r)
      if (meeting.hosts[static_cast<std::size_t>(r)] == host) found.push_back(r);
    return found;
  }
  template <class T>
  T& at(std::vector<T>& list) const {
    return list[static_cast<std::size_t>(rank)];
  }
  Rank over(Group& group) { return {rank, meeting.size(), process, group}; }

  void close() {
    engine.close(std::move(hierarchical));
    engine.close(std::move(local));
    if (stripe) engine.close(std::move(stripe));
    engine.close(std::move(world));
    engine.remove(transport);
    meeting.together.arrive_and_wait();
    CHECK(engine.num_closing_groups() == 0);
    meeting.together.arrive_and_wait();
    engine.stop();
    meeting.together.arrive_and_wait();  // the memory of other ranks is in use until all are done
  }
};

// A ring all_reduce in place, as schedule/lowering/lower.py writes it: partial sums go round, then results.
std::shared_ptr<const Plan> ring(int rank, int size, std::size_t numel) {
  auto plan = std::make_shared<Plan>();
  const auto chunk = [&](int c) -> Plan::Ranges {
    const auto k = static_cast<std::size_t>((c + 2 * size) % size), p = static_cast<std::size_t>(size);
    return {{Plan::output, numel * k / p * 4, numel * (k + 1) / p * 4 - numel * k / p * 4}};
  };
  const int left = (rank + size - 1) % size, right = (rank + 1) % size;
  plan->num_ranks = size;
  const auto add = [&](Verb verb, int recv_peer, int send_peer, int c, bool reads, bool writes) {
    Plan::Instruction i{};
    i.verb = verb, i.recv_peer = recv_peer, i.send_peer = send_peer, i.num_bytes = chunk(c)[0].num_bytes;
    if (reads) i.src = chunk(c);
    if (writes) i.dst = chunk(c);
    plan->add(std::move(i));
  };
  add(Verb::send, -1, right, rank, true, false);
  for (int k = 1; k < size; ++k) add(Verb::recv_reduce_send, left, right, rank - k, true, k == size - 1);
  for (int k = 0; k < size - 2; ++k) add(Verb::recv_send, left, right, rank - k, false, true);
  add(Verb::recv, left, -1, rank + 2, false, true);
  return plan;
}

void work(Rank rank, bool has_programs) {
  for (int round = 0; round < 2; ++round) {
    for (const std::size_t n : {std::size_t{0}, std::size_t{1}, std::size_t{1009}, std::size_t{150'001}})
      rank.every_operation(n);
    std::vector<float> x(300'007);
    for (const std::size_t n : {std::size_t{1009}, x.size()})
      if (has_programs && rank.size > 1) rank.all_reduce(x.data(), n, ring(rank.rank, rank.size, n));
    rank.messages(3);
    rank.messages(30'000);
    rank.asynchronous();
  }
}

void test_operations(const std::vector<int>& hosts) {
  Meeting meeting(hosts);
  run_ranks(meeting.size(), [&](int r) {
    Member me(meeting, r);
    std::vector<int> all_ranks;
    for (int p = 0; p < meeting.size(); ++p) all_ranks.push_back(p);
    std::unique_ptr<Group> other = me.network_group(7, r, all_ranks);
    // The second group belongs to a second thread of the rank.
    std::thread second([&] { work(me.over(*other), true); });
    work(me.over(*me.hierarchical), false);
    second.join();
    work(me.over(*other), true);
    // Both at once from one thread.
    Rank near = me.over(*me.hierarchical), far = me.over(*other);
    std::vector<float> a(200'000, 1), b(200'000, 1), c(5, 1);
    std::vector<std::pair<Rank*, OperationPointer>> flying;
    for (auto* data : {&a, &c})
      flying.emplace_back(&near, near.submit(Rank::request(OperationKind::all_reduce, data->data(),
                                                           data->data(), data->size())));
    flying.emplace_back(&far,
                        far.submit(Rank::request(OperationKind::all_reduce, b.data(), b.data(), b.size())));
    for (auto it = flying.rbegin(); it != flying.rend(); ++it) it->first->finish(it->second);
    for (const auto& data : {a, b, c})
      for (const float v : data) CHECK(v == static_cast<float>(meeting.size()));
    near.barrier();
    far.barrier();
    me.engine.close(std::move(other));
    me.close();
  });
}

enum class Fault { away, stopped, left, unwaited };
constexpr int culprit = 1;

// Rank 1 does not join an operation: its peers must name it, on both kinds of group and for every reason.
void test_fault(const std::vector<int>& hosts, bool is_hierarchical, Fault fault) {
  Meeting meeting(hosts);
  std::atomic<int> num_told{0};
  run_ranks(meeting.size(), [&](int r) {
    Member me(meeting, r);
    Group& group = is_hierarchical ? static_cast<Group&>(*me.hierarchical) : *me.world;
    Rank rank = me.over(group);
    std::vector<float> x(200'000), y(200'000), z(10);
    rank.all_reduce(x.data(), x.size());
    rank.barrier();
    const auto all_told = [&] { return num_told.load() == meeting.size() - 1; };
    if (r == culprit) {
      const auto wait = [&] {
        while (!all_told()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      };
      if (fault == Fault::stopped) me.engine.locked(wait);  // its transport is not served meanwhile
      if (fault == Fault::left) me.engine.remove(me.transport);
      wait();
    } else {
      const Nanoseconds limit = fault == Fault::unwaited ? Rank::timeout : second_ns;
      std::vector<Failure> told;
      std::vector<OperationPointer> ops;
      try {
        for (auto* d : {&x, &y, &z})
          ops.push_back(me.engine.submit(
              group, Rank::request(OperationKind::all_reduce, d->data(), d->data(), d->size()), limit));
        if (fault == Fault::unwaited && !me.engine.wait(*ops[0], second_ns / 4))
          me.engine.expire(group, *ops[0]);
        for (const OperationPointer& op : ops) CHECK(me.engine.wait(*op, -1));
        rank.barrier();
      } catch (const Failed& refused) {  // no later than at the barrier
        told.push_back(refused.failure);
      }
      CHECK(told.size() == 1);
      for (const OperationPointer& op : ops) {
        CHECK(me.engine.wait(*op, -1));
        told.push_back(op->failure);
      }
      for (const Failure& why : told) {
        const bool is_named = why.detail.find("rank 1") != std::string::npos;
        const bool is_right =
            why.kind == (fault == Fault::left ? FailureKind::peer_lost : FailureKind::timeout);
        if (!is_named || !is_right) std::fprintf(stderr, "rank %d: %s\n", r, why.detail.c_str());
        CHECK(is_named && is_right);
      }
      ++num_told;
    }
    meeting.together.arrive_and_wait();
    me.close();
  });
}

}  // namespace

CASE(one_rank_a_host) {
  for (const auto& hosts : std::vector<std::vector<int>>{{0}, {0, 1}, {0, 1, 2}}) test_operations(hosts);
}
CASE(several_ranks_a_host) {
  for (const auto& hosts : std::vector<std::vector<int>>{{0, 0, 1}, {0, 1, 0, 1}}) test_operations(hosts);
}
CASE(a_rank_stays_away) {
  for (const bool is_hierarchical : {false, true}) test_fault({0, 0, 1}, is_hierarchical, Fault::away);
}
CASE(a_rank_stops) {
  for (const bool is_hierarchical : {false, true}) test_fault({0, 1, 1}, is_hierarchical, Fault::stopped);
}
CASE(a_rank_leaves) {
  for (const bool is_hierarchical : {false, true}) test_fault({0, 1, 2}, is_hierarchical, Fault::left);
}
CASE(a_caller_waits_no_longer) {
  for (const bool is_hierarchical : {false, true}) test_fault({0, 1, 0}, is_hierarchical, Fault::unwaited);
}

int main(int argc, char** argv) { return run_cases(argc, argv); }
