// Collectives over TCP against their definition: every kind, sizes around all limits, 1 to 5 ranks.
#include <poll.h>

#include <random>

#include "core/base/reduce.h"
#include "core/network/direct.h"
#include "mesh.h"

using namespace paceline;

namespace {

struct DirectRank {
  TcpTransport& transport;
  GroupTransport ranks;
  std::uint64_t sequence = 0;
  bool did_move = false;

  DirectRank(Mesh& mesh, int rank, std::uint32_t space = 1) : transport(mesh[rank]) {
    ranks.transport = &transport;
    ranks.did_move = &did_move;
    ranks.explain = [](const Transfer& t) { return t.failure; };
    ranks.rank = rank;
    for (std::size_t r = 0; r < mesh.ranks.size(); ++r) ranks.world_ranks.push_back(static_cast<int>(r));
    ranks.space = space;
    ranks.one_step_bytes = default_one_step_bytes(ranks.size());
  }

  void run(Request request, double seconds = 20) {
    Operation op;
    op.request = std::move(request);
    op.sequence = ++sequence;
    op.task = run_directly(ranks, op);
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (!op.task.is_done()) {
      did_move = false;
      const bool has_moved = transport.progress();
      if (op.task.step() || has_moved || did_move) continue;
      CHECK(std::chrono::steady_clock::now() < end);
      pollfd waiting{transport.event_fd(), POLLIN, 0};
      ::poll(&waiting, 1, 100);
    }
  }
};

std::vector<float> values(int rank, std::size_t numel) {
  std::mt19937 random(static_cast<unsigned>(rank) * 77 + 1);
  std::vector<float> v(numel);
  for (auto& x : v) x = std::uniform_real_distribution<float>(-1, 1)(random);
  return v;
}

std::vector<float> combined(int size, std::size_t numel, ReduceOp op) {
  std::vector<std::vector<float>> all;
  std::vector<const void*> from;
  for (int r = 0; r < size; ++r) all.push_back(values(r, numel));
  for (auto& v : all) from.push_back(v.data());
  std::vector<float> out(numel);
  void* to = out.data();
  reduce(DType::float32, op, &to, 1, from.data(), size, numel, size);
  return out;
}

Request request(OperationKind kind, const std::vector<float>& source, std::vector<float>& output,
                std::size_t numel) {
  Request r;
  r.kind = kind;
  r.dtype = DType::float32;
  r.source = reinterpret_cast<const std::byte*>(source.data());
  r.output = reinterpret_cast<std::byte*>(output.data());
  r.numel = numel;
  return r;
}

std::vector<Range> ranges(const std::vector<std::size_t>& counts) {
  std::vector<Range> out;
  std::size_t at = 0;
  for (const auto n : counts) out.push_back({at * 4, n * 4}), at += n;
  return out;
}

const std::vector<std::size_t> numels{0, 1, 3, 500, 2047, 2048, 2049, 33000, 70001, 1000003};

bool is_equal(const float* a, const float* b, std::size_t n) {
  return n == 0 || std::memcmp(a, b, n * 4) == 0;
}

}  // namespace

CASE(combining) {
  for (int size = 1; size <= 5; ++size) {
    Mesh mesh(size);
    run_ranks(size, [&](int rank) {
      DirectRank me(mesh, rank);
      for (const std::size_t n : numels) {
        for (const ReduceOp op : {ReduceOp::sum, ReduceOp::mean}) {
          const auto source = values(rank, n), expected = combined(size, n, op);
          auto in_place = source;
          Request r = request(OperationKind::all_reduce, in_place, in_place, n);
          r.op = op;
          me.run(r);
          CHECK(is_equal(in_place.data(), expected.data(), n));
          const int root = static_cast<int>(n % static_cast<std::size_t>(size));
          std::vector<float> output(n, -7.0f);
          r = request(OperationKind::reduce, source, output, n);
          r.op = op, r.root = root;
          if (rank != root) r.output = nullptr;
          me.run(r);
          if (rank == root) CHECK(is_equal(output.data(), expected.data(), n));
          // Uneven parts: rank 0 gets most, the last one nothing.
          std::vector<std::size_t> counts(static_cast<std::size_t>(size), size > 2 ? n / 7 : 0);
          counts.back() = 0;
          counts[0] = n - (size > 2 ? static_cast<std::size_t>(size - 2) * (n / 7) : 0);
          r = request(OperationKind::reduce_scatter, source, output, n);
          r.op = op, r.parts = ranges(counts);
          const Range mine = r.parts[static_cast<std::size_t>(rank)];
          me.run(r);
          CHECK(is_equal(output.data(), expected.data() + mine.offset / 4, mine.num_bytes / 4));
        }
      }
    });
  }
}

CASE(exchanging) {
  for (int size = 1; size <= 5; ++size) {
    Mesh mesh(size);
    run_ranks(size, [&](int rank) {
      DirectRank me(mesh, rank);
      const auto P = static_cast<std::size_t>(size);
      for (const std::size_t n : numels) {
        const int root = static_cast<int>(n % P);
        std::vector<float> output(n * P, -7.0f), expected;
        for (int r = 0; r < size; ++r) {
          const auto v = values(r, n);
          expected.insert(expected.end(), v.begin(), v.end());
        }
        auto source = values(rank, n);
        Request r = request(OperationKind::broadcast, source, source, n);
        r.root = root;
        r.send = rank == root ? std::vector<Range>{{0, n * 4}} : std::vector<Range>{};
        r.is_same_for_all = true;
        r.receive.assign(P, Range{});
        if (rank != root) r.receive[static_cast<std::size_t>(root)] = {0, n * 4};
        me.run(r);
        CHECK(is_equal(source.data(), expected.data() + n * static_cast<std::size_t>(root), n));

        source = values(rank, n);
        r = request(OperationKind::all_gather, source, output, n);
        r.send = {{0, n * 4}}, r.is_same_for_all = true, r.receive = ranges(std::vector<std::size_t>(P, n));
        me.run(r);
        CHECK(output == expected);

        std::vector<std::size_t> out_counts(P), in_counts(P);  // what p sends to q: n / (1 + p + 2q) elements
        for (std::size_t q = 0; q < P; ++q) {
          out_counts[q] = n / (1 + static_cast<std::size_t>(rank) + 2 * q);
          in_counts[q] = n / (1 + q + 2 * static_cast<std::size_t>(rank));
        }
        source = values(rank, n * P);
        r = request(OperationKind::all_to_all, source, output, n);
        r.send = ranges(out_counts), r.receive = ranges(in_counts);
        me.run(r);
        for (std::size_t p = 0; p < P; ++p) {
          std::size_t at = 0;
          for (int q = 0; q < rank; ++q) at += n / (1 + p + 2 * static_cast<std::size_t>(q));
          const auto theirs = values(static_cast<int>(p), n * P);
          CHECK(is_equal(output.data() + r.receive[p].offset / 4, theirs.data() + at, in_counts[p]));
        }
        Request wait;
        wait.kind = OperationKind::barrier;
        me.run(wait);
      }
    });
  }
}

CASE(differing_calls_are_named) {
  for (const std::size_t n : {10ul, 100000ul}) {
    Mesh mesh(3);
    run_ranks(3, [&](int rank) {
      DirectRank me(mesh, rank);
      std::vector<float> data(n + 1);
      Request r = request(rank == 1 ? OperationKind::broadcast : OperationKind::all_reduce, data, data, n);
      r.send = {{0, n * 4}}, r.is_same_for_all = true, r.root = rank == 1 ? 1 : 0;
      r.receive.assign(3, Range{});
      bool is_refused = false;
      try {
        me.run(r, 20);
      } catch (const Failed& error) {
        is_refused = error.failure.kind == FailureKind::mismatch;
        if (rank != 1) CHECK(error.failure.rank == 1);
      }
      CHECK(is_refused || rank == 1);  // the sender of a broadcast receives no header
      const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(300);
      while (std::chrono::steady_clock::now() < end) me.transport.progress();
    });
  }
}

CASE(a_peer_dies) {
  for (const std::size_t n : {10ul, 3000000ul}) {
    Mesh mesh(3);
    run_ranks(3, [&](int rank) {
      std::vector<float> data(n);
      {
        DirectRank me(mesh, rank);
        me.run(request(OperationKind::all_reduce, data, data, n));
        if (rank != 2) {
          bool is_lost = false;
          try {
            me.run(request(OperationKind::all_reduce, data, data, n));
          } catch (const Failed& error) {
            // The rank that gives up first closes its transfers, so the second one to notice may blame the
            // first.
            is_lost =
                error.failure.kind == FailureKind::peer_lost || error.failure.kind == FailureKind::aborted;
          }
          CHECK(is_lost);
        }
      }
      if (rank == 2) mesh.ranks[2].reset();
    });
  }
}

int main(int argc, char** argv) { return run_cases(argc, argv); }
