// Every operation of one group, called by one rank and compared with its definition. Made for the sanitizers.
#pragma once
#include <vector>

#include "check.h"
#include "core/shared_memory/process.h"

namespace paceline {

struct Rank {
  int rank, size;
  Process& process;
  Group& group;

  static constexpr Nanoseconds timeout = 60 * second_ns;

  void finish(const OperationPointer& op) {
    CHECK(process.engine.wait(*op, -1));
    if (op->failure) std::fprintf(stderr, "%s\n", op->failure.detail.c_str());
    CHECK(!op->failure);
  }
  OperationPointer submit(Request r) { return process.engine.submit(group, std::move(r), timeout); }

  static Request request(OperationKind kind, const float* source, float* output, std::size_t numel) {
    Request r;
    r.kind = kind;
    r.dtype = DType::float32;
    r.source = reinterpret_cast<const std::byte*>(source);
    r.output = reinterpret_cast<std::byte*>(output);
    r.numel = numel;
    return r;
  }

  // P blocks of n elements.
  std::vector<Range> blocks(std::size_t n) const {
    std::vector<Range> found;
    for (int p = 0; p < size; ++p) found.push_back({static_cast<std::size_t>(p) * n * 4, n * 4});
    return found;
  }
  // n elements for or from `peer` alone.
  std::vector<Range> only(int peer, std::size_t n) const {
    std::vector<Range> found(static_cast<std::size_t>(size));
    found[static_cast<std::size_t>(peer)] = {0, n * 4};
    return found;
  }
  std::size_t num_ranks() const { return static_cast<std::size_t>(size); }
  // What ranks 1 … P add up to.
  float total() const { return static_cast<float>(size * (size + 1) / 2); }
  static float value(int r, std::size_t i) { return static_cast<float>(r + 1) * static_cast<float>(i % 7); }
  std::vector<float> values(std::size_t n) const {
    std::vector<float> x(n);
    for (std::size_t i = 0; i < n; ++i) x[i] = value(rank, i);
    return x;
  }

  void all_reduce(float* x, std::size_t n, std::shared_ptr<const Plan> plan = nullptr) {
    for (std::size_t i = 0; i < n; ++i) x[i] = value(rank, i);
    Request r = request(OperationKind::all_reduce, x, x, n);
    r.plan = std::move(plan);
    finish(submit(r));
    for (std::size_t i = 0; i < n; ++i) CHECK(x[i] == total() * static_cast<float>(i % 7));
  }

  void reduce(std::size_t n, int root) {
    std::vector<float> x = values(n);
    Request r = request(OperationKind::reduce, x.data(), x.data(), n);
    r.root = root;
    finish(submit(r));
    for (std::size_t i = 0; i < n && rank == root; ++i) CHECK(x[i] == total() * static_cast<float>(i % 7));
  }

  void reduce_scatter(std::size_t n) {
    const std::vector<float> x = values(n * num_ranks());
    std::vector<float> out(n);
    Request r = request(OperationKind::reduce_scatter, x.data(), out.data(), n * num_ranks());
    r.parts = blocks(n);
    finish(submit(r));
    for (std::size_t i = 0; i < n; ++i)
      CHECK(out[i] == total() * static_cast<float>((static_cast<std::size_t>(rank) * n + i) % 7));
  }

  void broadcast(std::size_t n, int root) {
    std::vector<float> x = values(n);
    Request r = request(OperationKind::broadcast, x.data(), x.data(), n);
    r.root = root;
    r.is_same_for_all = true;
    if (rank == root) r.send = {{0, n * 4}};
    else r.receive = only(root, n);
    finish(submit(r));
    for (std::size_t i = 0; i < n; ++i) CHECK(x[i] == value(root, i));
  }

  void all_gather(const float* x, float* out, std::size_t n) {
    Request r = request(OperationKind::all_gather, x, out, n);
    r.is_same_for_all = true;
    r.send = {{0, n * 4}};
    r.receive = blocks(n);
    finish(submit(r));
    for (int p = 0; p < size; ++p)
      for (std::size_t i = 0; i < n; ++i)
        CHECK(out[static_cast<std::size_t>(p) * n + i] == x[i] + static_cast<float>(p - rank));
  }

  void gather(std::size_t n, int root) {
    const std::vector<float> x = values(n);
    std::vector<float> out(rank == root ? n * num_ranks() : 0);
    Request r = request(OperationKind::gather, x.data(), out.data(), n);
    r.root = root;
    r.send = only(root, n);
    if (rank == root) r.receive = blocks(n);
    finish(submit(r));
    for (std::size_t i = 0; i < out.size(); ++i) CHECK(out[i] == value(static_cast<int>(i / n), i % n));
  }

  void scatter(std::size_t n, int root) {
    const std::vector<float> x = values(n * num_ranks());
    std::vector<float> out(n);
    Request r = request(OperationKind::scatter, x.data(), out.data(), n);
    r.root = root;
    r.receive = only(root, n);
    if (rank == root) r.send = blocks(n);
    finish(submit(r));
    for (std::size_t i = 0; i < n; ++i) CHECK(out[i] == value(root, static_cast<std::size_t>(rank) * n + i));
  }

  void all_to_all(std::size_t n) {
    std::vector<float> x(n * num_ranks()), out(x.size());
    for (std::size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<float>(rank * 100) + static_cast<float>(i / n);
    Request r = request(OperationKind::all_to_all, x.data(), out.data(), n);
    r.send = r.receive = blocks(n);
    finish(submit(r));
    for (std::size_t i = 0; i < x.size(); ++i)
      CHECK(out[i] == static_cast<float>(i / n) * 100 + static_cast<float>(rank));
  }

  void barrier() { finish(submit(request(OperationKind::barrier, nullptr, nullptr, 0))); }

  void messages(std::size_t n) {
    std::vector<float> x(n, static_cast<float>(rank)), a(n), b(n);
    Request s = request(OperationKind::send, x.data(), nullptr, n),
            r = request(OperationKind::receive, nullptr, a.data(), n);
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

  // Many at once, small ones behind large ones, waited for from the last to the first.
  void asynchronous() {
    std::vector<std::vector<float>> data;
    std::vector<OperationPointer> ops;
    for (std::size_t i = 0; i < 12; ++i) {
      data.emplace_back(i % 3 == 2 ? 200'000u : 10u, static_cast<float>(rank));
      ops.push_back(
          submit(request(OperationKind::all_reduce, data[i].data(), data[i].data(), data[i].size())));
    }
    for (std::size_t i = ops.size(); i-- > 0;) finish(ops[i]);
    for (const auto& d : data)
      for (const float v : d) CHECK(v == static_cast<float>(size * (size - 1) / 2));
  }

  // Everything, on private memory.
  void every_operation(std::size_t n) {
    std::vector<float> x(n), out(n * num_ranks());
    all_reduce(x.data(), n);
    for (float& v : x) v = static_cast<float>(rank);
    all_gather(x.data(), out.data(), n);
    reduce_scatter(n);
    all_to_all(n);
    for (const int root : {0, size - 1}) {
      reduce(n, root);
      broadcast(n, root);
      gather(n, root);
      scatter(n, root);
    }
    barrier();
  }
};

}  // namespace paceline
