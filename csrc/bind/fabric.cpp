// Engine, groups, operations: raw pointers and counts in, the GIL released while the core works.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "bind/bind.h"
#include "bind/tensor.h"
#include "core/base/reduce.h"
#include "core/hierarchical/hierarchical_group.h"
#include "core/network/network_group.h"
#include "core/shared_memory/process.h"
#include "core/shared_memory/shared_memory_group.h"
#include "core/tcp/tcp_transport.h"

namespace nb = nanobind;

namespace paceline::bind {
namespace {

using Counts = std::vector<std::size_t>;
using PlainAddress = std::tuple<int, int, std::uint32_t, std::uint32_t, std::uint64_t>;

// A group with the process whose engine drives it; closed at the latest when Python drops it.
template <class G>
struct GroupHandle {
  std::shared_ptr<Process> process;
  std::unique_ptr<G> group;

  GroupHandle(std::shared_ptr<Process> p, std::unique_ptr<G> g)
      : process(std::move(p)), group(std::move(g)) {}
  ~GroupHandle() { close(); }
  Engine& engine() { return process->engine; }
  void close() {
    if (group) engine().close(std::move(group));
  }
  G& get() {
    if (!group) throw Failed({FailureKind::aborted, -1, "this communicator was closed"});
    return *group;
  }
};

// What a ledger counts of one kind of operation.
struct OperationCount {
  std::uint64_t calls = 0;
  std::uint64_t payload_bytes = 0;
};

struct SharedMemoryHandle : GroupHandle<SharedMemoryGroup> {
  SharedMemoryHandle(const std::shared_ptr<Process>& p, int rank, int size)
      : GroupHandle(p, std::make_unique<SharedMemoryGroup>(p->engine, p->memory, rank, size)) {}
  std::shared_ptr<OperationCount> reduced = std::make_shared<OperationCount>();  // may be another group's
};
using NetworkHandle = GroupHandle<NetworkGroup>;
using HierarchicalHandle = GroupHandle<HierarchicalGroup>;

// A transport that the engine serves for as long as Python or a group holds it.
struct TransportHandle {
  std::shared_ptr<Process> process;
  std::shared_ptr<TcpTransport> transport;

  TransportHandle(std::shared_ptr<Process> p, int rank, int size, const nb::bytes& secret,
                  const nb::bytes& session, const std::string& interfaces, const std::string& towards)
      : process(std::move(p)) {
    TcpOptions options;
    options.rank = rank;
    options.size = size;
    const auto bytes = [](const nb::bytes& b) {
      const auto* data = reinterpret_cast<const std::byte*>(b.c_str());
      return std::vector<std::byte>(data, data + b.size());
    };
    options.secret = bytes(secret);
    options.session = bytes(session);
    options.interfaces = interfaces;
    if (!towards.empty()) options.towards = towards;
    transport = std::make_shared<TcpTransport>(options);
  }
  void set_peers(const std::vector<std::string>& endpoints) {
    transport->set_peers(endpoints);
    process->engine.add(transport);
  }
  void close() { process->engine.remove(transport); }
};

std::vector<Range> ranges(const Counts& counts, std::size_t element) {
  std::vector<Range> out;
  std::size_t at = 0;
  for (const std::size_t n : counts) {
    out.push_back({at, n * element});
    at += n * element;
  }
  return out;
}

constexpr auto soon = Engine::Return::soon, when_done = Engine::Return::when_done;

// nullptr if it is done already and has not failed: the common case costs no object.
template <Engine::Return returns = soon, class M>
OperationPointer submit(M& m, Request&& request, double timeout_s, std::uint64_t announced = 0) {
  OperationPointer op =
      m.engine().submit(m.get(), std::move(request), from_seconds(timeout_s), announced, returns);
  if (!op->is_done.load()) return op;
  if (op->failure) throw Failed(op->failure);
  return nullptr;
}

Request basic(int kind, std::uintptr_t source, std::uintptr_t output, std::size_t numel, int dtype) {
  Request r;
  r.kind = static_cast<OperationKind>(kind);
  r.dtype = static_cast<DType>(dtype);
  r.source = reinterpret_cast<const std::byte*>(source);
  r.output = reinterpret_cast<std::byte*>(output);
  r.numel = numel;
  return r;
}

template <class M, Engine::Return returns>
OperationPointer combine(M& m, int kind, std::uintptr_t source, std::uintptr_t output, std::size_t numel,
                         int dtype, int op, int root, const Counts& counts, double timeout_s) {
  Request r = basic(kind, source, output, numel, dtype);
  r.op = static_cast<ReduceOp>(op);
  r.root = root;
  if (!counts.empty()) r.parts = ranges(counts, size_of(r.dtype));
  return submit<returns>(m, std::move(r), timeout_s);
}

// In place. A small one is done before it pays to release the interpreter. Returns None if it is done, an
// Operation if it is in flight, and False if `tensor` is not contiguous CPU memory that the operator is
// defined for.
template <Engine::Return returns>
nb::object all_reduce(SharedMemoryHandle& m, nb::handle tensor, int op, double timeout_s) {
  const auto memory = memory_of(tensor);
  if (!memory || !is_reducible(memory->dtype, static_cast<ReduceOp>(op))) return nb::bool_(false);
  ++m.reduced->calls;
  m.reduced->payload_bytes += memory->numel * size_of(memory->dtype);
  const SmallReduce call{memory->data, memory->numel, memory->dtype, static_cast<ReduceOp>(op)};
  Group::AtOnce at_once;
  if (m.group && m.group->ranks_are_processes()) at_once = m.engine().all_reduce_at_once(*m.group, call);
  if (at_once.is_done) return nb::none();
  OperationPointer pending;
  {
    const nb::gil_scoped_release released;
    const auto data = reinterpret_cast<std::uintptr_t>(call.data);
    Request r = basic(static_cast<int>(OperationKind::all_reduce), data, data, call.numel,
                      static_cast<int>(call.dtype));
    r.op = call.op;
    pending = submit<returns>(m, std::move(r), timeout_s, at_once.announced);
  }
  return pending ? nb::cast(std::move(pending)) : nb::none();
}

template <class M, Engine::Return returns>
OperationPointer exchange(M& m, int kind, std::uintptr_t source, std::uintptr_t output, std::size_t numel,
                          int dtype, int root, const Counts& send, const Counts& receive,
                          bool is_same_for_all, double timeout_s) {
  Request r = basic(kind, source, output, numel, dtype);
  r.root = root;
  r.send = ranges(send, size_of(r.dtype));
  r.receive = ranges(receive, size_of(r.dtype));
  r.is_same_for_all = is_same_for_all;
  return submit<returns>(m, std::move(r), timeout_s);
}

// As exchange, for tensors at separate addresses: `send[i]` bytes at `sources[i]` go to rank i, `receive[i]`
// bytes from it to `outputs[i]`. One source for all ranks if it is the same.
template <Engine::Return returns>
OperationPointer exchange_lists(SharedMemoryHandle& m, int kind, const std::vector<std::uintptr_t>& sources,
                                const Counts& send, const std::vector<std::uintptr_t>& outputs,
                                const Counts& receive, std::size_t numel, int dtype, bool is_same_for_all,
                                double timeout_s) {
  const auto place = [](const std::vector<std::uintptr_t>& at, const Counts& num_bytes,
                        std::vector<Range>& ranges) {
    const std::uintptr_t base = *std::min_element(at.begin(), at.end());
    for (std::size_t i = 0; i < at.size(); ++i) ranges.push_back({at[i] - base, num_bytes.at(i)});
    return base;
  };
  std::vector<Range> to, from;
  const std::uintptr_t source = place(sources, send, to), output = place(outputs, receive, from);
  Request r = basic(kind, source, output, numel, dtype);
  r.send = std::move(to);
  r.receive = std::move(from);
  r.is_same_for_all = is_same_for_all;
  return submit<returns>(m, std::move(r), timeout_s);
}

template <class M>
OperationPointer send(M& m, std::uintptr_t source, std::size_t numel, int dtype, int peer, std::int64_t tag,
                      double timeout_s) {
  Request r = basic(static_cast<int>(OperationKind::send), source, 0, numel, dtype);
  r.root = peer;
  r.tag = tag;
  return submit(m, std::move(r), timeout_s);
}

template <class M>
OperationPointer receive(M& m, std::uintptr_t output, std::size_t numel, int dtype, int peer,
                         std::int64_t tag, double timeout_s) {
  Request r = basic(static_cast<int>(OperationKind::receive), 0, output, numel, dtype);
  r.root = peer;
  r.tag = tag;
  // From any rank: the operation knows the sender, so it is returned even if it is done.
  if (peer == any_rank) return m.engine().submit(m.get(), std::move(r), from_seconds(timeout_s));
  return submit(m, std::move(r), timeout_s);
}

// A negative timeout waits as long as the operation's own deadline.
template <class M>
void wait(M& m, Operation& op, double timeout_s) {
  if (!m.engine().wait(op, timeout_s < 0 ? -1 : from_seconds(timeout_s)) && m.group)
    m.engine().expire(*m.group, op);
  if (op.failure) throw Failed(op.failure);
}

OperationPointer run(NetworkHandle& m, const std::shared_ptr<Plan>& plan, int kind, std::uintptr_t source,
                     std::uintptr_t output, std::size_t numel, int dtype, int op, int root,
                     double timeout_s) {
  Request r = basic(kind, source, output, numel, dtype);
  r.op = static_cast<ReduceOp>(op);
  r.root = root;
  r.plan = plan;
  return submit(m, std::move(r), timeout_s);
}

using release = nb::call_guard<nb::gil_scoped_release>;

// Names of arguments cost a call by position 8 ns, so those on the microsecond path have none.
template <Engine::Return returns, class M>
void def_combine(nb::class_<M>& type, const char* name) {
  type.def(name, &combine<M, returns>, release(), nb::arg("kind"), nb::arg("source"), nb::arg("output"),
           nb::arg("numel"), nb::arg("dtype"), nb::arg("op"), nb::arg("root"), nb::arg("counts"),
           nb::arg("timeout_s"));
}

template <Engine::Return returns, class M>
void def_exchange(nb::class_<M>& type, const char* name) {
  type.def(name, &exchange<M, returns>, release(), nb::arg("kind"), nb::arg("source"), nb::arg("output"),
           nb::arg("numel"), nb::arg("dtype"), nb::arg("root"), nb::arg("send"), nb::arg("receive"),
           nb::arg("is_same_for_all"), nb::arg("timeout_s"));
}

template <Engine::Return returns>
void def_exchange_lists(nb::class_<SharedMemoryHandle>& type, const char* name) {
  type.def(name, &exchange_lists<returns>, release(), nb::arg("kind"), nb::arg("sources"), nb::arg("send"),
           nb::arg("outputs"), nb::arg("receive"), nb::arg("numel"), nb::arg("dtype"),
           nb::arg("is_same_for_all"), nb::arg("timeout_s"));
}

// What all groups offer.
template <class M>
void def_shared_methods(nb::class_<M>& type) {
  def_combine<soon>(type, "combine");
  def_exchange<soon>(type, "exchange");
  type.def("send", &send<M>, release(), nb::arg("source"), nb::arg("numel"), nb::arg("dtype"),
           nb::arg("peer"), nb::arg("tag"), nb::arg("timeout_s"));
  type.def("receive", &receive<M>, release(), nb::arg("output"), nb::arg("numel"), nb::arg("dtype"),
           nb::arg("peer"), nb::arg("tag"), nb::arg("timeout_s"));
  type.def("wait", &wait<M>, release(), nb::arg("operation"), nb::arg("timeout_s"));
  type.def("poll", [](M& g, Operation& op) { return g.engine().poll(op); }, release(), nb::arg("operation"));
  type.def(
      "abort",
      [](M& g, const std::string& why) {
        if (g.group) g.engine().abort(*g.group, {FailureKind::aborted, -1, why});
      },
      release(), nb::arg("why"));
  type.def("close", &M::close, release());
}

nb::object allocate(const std::shared_ptr<Process>& process, std::size_t num_bytes) {
  struct Block {
    std::shared_ptr<Process> process;
    void* pointer;
  };
  void* p = process->memory.arena().allocate(num_bytes);
  nb::capsule owner(new Block{process, p}, [](void* self) noexcept {
    const std::unique_ptr<Block> block(static_cast<Block*>(self));
    block->process->memory.free(block->pointer);
  });
  return nb::cast(nb::ndarray<std::uint8_t, nb::ndim<1>, nb::device::cpu>(p, {num_bytes}, owner));
}

void raise_as_python(const std::exception_ptr& error, void*) {
  try {
    std::rethrow_exception(error);
  } catch (const Failed& failed) {
    static constexpr const char* names[] = {"CommError",     "PeerLost",    "Timeout",  "Mismatch",
                                            "ProtocolError", "ConfigError", "CommError"};
    const nb::object type =
        nb::module_::import_("paceline.errors").attr(names[static_cast<int>(failed.failure.kind)]);
    PyErr_SetString(type.ptr(), failed.failure.detail.c_str());
  }
}

}  // namespace

void bind_fabric(nb::module_& m) {
  nb::register_exception_translator(raise_as_python);

  m.def("eager_reduce_bytes", &Outbox::eager_reduce_bytes, nb::arg("num_ranks"),
        "Reductions of this number of ranks are eager up to this size.");
  m.def("eager_exchange_bytes", &Outbox::eager_exchange_bytes, nb::arg("num_ranks"),
        nb::arg("is_same_for_all"), "Exchanges between this number of ranks are eager up to this size.");

  nb::enum_<OperationKind>(m, "OperationKind", nb::is_arithmetic(), "The operations of a group.")
      .value("ALL_REDUCE", OperationKind::all_reduce)
      .value("REDUCE", OperationKind::reduce)
      .value("REDUCE_SCATTER", OperationKind::reduce_scatter)
      .value("BROADCAST", OperationKind::broadcast)
      .value("ALL_GATHER", OperationKind::all_gather)
      .value("GATHER", OperationKind::gather)
      .value("SCATTER", OperationKind::scatter)
      .value("ALL_TO_ALL", OperationKind::all_to_all)
      .value("BARRIER", OperationKind::barrier)
      .value("SEND", OperationKind::send)
      .value("RECEIVE", OperationKind::receive);
  m.attr("ANY_RANK") = any_rank;

  nb::class_<Operation>(m, "Operation")
      .def_prop_ro("is_done", [](Operation& op) { return op.is_done.load(); })
      .def("raise_failure",
           [](Operation& op) {
             if (op.is_done.load() && op.failure) throw Failed(op.failure);
           })
      .def_prop_ro("peer", [](Operation& op) { return op.request.root; });

  nb::class_<Process>(m, "Engine")
      .def(nb::init<>())
      .def("allocate", &allocate)
      .def("set_ranks_on_host", [](Process& p, int num_ranks) { p.engine.set_ranks_on_host(num_ranks); })
      .def(
          "stop", [](Process& p) { p.engine.stop(); }, release())
      .def("watch", [](Process& p, Operation& op,
                       std::uint64_t token) { return p.engine.completions().watch(op, token); })
      .def(
          "take_completed",
          [](Process& p, double timeout_s, std::size_t most) {
            return p.engine.completions().take(from_seconds(timeout_s), most);
          },
          release())
      .def("close_completions", [](Process& p) { p.engine.completions().close(); })
      .def(
          "num_closing_groups", [](Process& p) { return p.engine.num_closing_groups(); }, release())
      .def("is_shared",
           [](Process& p, std::uintptr_t pointer, std::size_t num_bytes) {
             return p.memory.arena().locate(reinterpret_cast<void*>(pointer), num_bytes).is_shared();
           })
      .def_prop_ro("num_segments", [](Process& p) { return p.memory.arena().num_segments(); })
      .def_prop_ro("allocated_bytes", [](Process& p) { return p.memory.arena().allocated_bytes(); });

  nb::class_<OperationCount>(m, "OperationCount")
      .def_rw("calls", &OperationCount::calls)
      .def_rw("payload_bytes", &OperationCount::payload_bytes);

  nb::class_<SharedMemoryHandle> group(m, "SharedMemoryGroup");
  group.def(nb::init<const std::shared_ptr<Process>&, int, int>())
      .def_prop_ro("address",
                   [](SharedMemoryHandle& g) -> PlainAddress {
                     const OutboxAddress a = g.get().address();
                     return {a.pid, a.control_fd, a.outbox.slot, a.outbox.generation, a.outbox.offset};
                   })
      .def(
          "connect",
          [](SharedMemoryHandle& g, const std::vector<PlainAddress>& plain) {
            std::vector<OutboxAddress> addresses;
            for (const auto& [pid, fd, slot, generation, offset] : plain)
              addresses.push_back({pid, fd, {slot, generation, offset}});
            if (!g.engine().locked([&] { g.get().connect(addresses); }))
              throw Failed(
                  {FailureKind::aborted, -1, "a forked process cannot join a group of its parent's"});
          },
          release())
      .def_rw("reduced", &SharedMemoryHandle::reduced)
      .def("all_reduce", &all_reduce<soon>)
      .def("all_reduce_now", &all_reduce<when_done>);
  def_combine<when_done>(group, "combine_now");
  def_exchange<when_done>(group, "exchange_now");
  def_exchange_lists<soon>(group, "exchange_lists");
  def_exchange_lists<when_done>(group, "exchange_lists_now");
  def_shared_methods(group);

  nb::class_<TransportHandle>(m, "TcpTransport")
      .def(nb::init<std::shared_ptr<Process>, int, int, const nb::bytes&, const nb::bytes&,
                    const std::string&, const std::string&>(),
           nb::arg("engine"), nb::arg("rank"), nb::arg("size"), nb::arg("secret"), nb::arg("session"),
           nb::arg("interfaces"), nb::arg("towards"))
      .def_prop_ro("endpoints", [](TransportHandle& t) { return t.transport->endpoints(); })
      .def_prop_ro("wire_bytes",
                   [](TransportHandle& t) {
                     std::uint64_t sent = 0;
                     const nb::gil_scoped_release released;
                     t.process->engine.locked([&] { sent = t.transport->wire_bytes_sent(); });
                     return sent;
                   })
      .def("set_peers", &TransportHandle::set_peers, release())
      .def("close", &TransportHandle::close, release());

  nb::class_<NetworkHandle> network_group(m, "NetworkGroup");
  network_group
      .def(
          "__init__",
          [](NetworkHandle* self, const TransportHandle& t, std::uint32_t id, int rank,
             const std::vector<int>& world_ranks) {
            auto group = std::make_unique<NetworkGroup>(
                t.process->engine, std::shared_ptr<Transport>(t.transport), id, rank, world_ranks);
            new (self) NetworkHandle(t.process, std::move(group));
            const nb::gil_scoped_release released;
            self->engine().locked([&] { self->group->watch(); });
          },
          nb::arg("transport"), nb::arg("id"), nb::arg("rank"), nb::arg("world_ranks"))
      .def("run", &run, release(), nb::arg("plan"), nb::arg("kind"), nb::arg("source"), nb::arg("output"),
           nb::arg("numel"), nb::arg("dtype"), nb::arg("op"), nb::arg("root"), nb::arg("timeout_s"));
  def_shared_methods(network_group);

  nb::class_<HierarchicalHandle> hierarchical_group(m, "HierarchicalGroup");
  hierarchical_group.def(
      "__init__",
      [](HierarchicalHandle* self, int rank, const std::vector<int>& hosts, SharedMemoryHandle& local,
         NetworkHandle& world, NetworkHandle* stripe) {
        auto group = std::make_unique<HierarchicalGroup>(local.engine(), rank, hosts, local.get(),
                                                         world.get(), stripe ? &stripe->get() : nullptr);
        new (self) HierarchicalHandle(local.process, std::move(group));
      },
      nb::arg("rank"), nb::arg("hosts"), nb::arg("local"), nb::arg("world"), nb::arg("stripe").none(),
      nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>());
  def_shared_methods(hierarchical_group);
}

}  // namespace paceline::bind
