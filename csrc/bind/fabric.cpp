// Engine, Group, Operation: raw pointers and counts in, the GIL released while the core works.
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
#include "core/engine/engine.h"
#include "core/hierarchical/hierarchical_group.h"
#include "core/network/network_group.h"
#include "core/base/reduce.h"
#include "core/tcp/tcp.h"

namespace nb = nanobind;

namespace paceline::bind {
namespace {

using Counts = std::vector<std::size_t>;
using PlainAddress = std::tuple<int, int, std::uint32_t, std::uint32_t, std::uint64_t>;

// A Group with the engine that it lives on; closed at the latest when Python drops it.
template <class G>
struct Holder {
  std::shared_ptr<Engine> engine;
  std::unique_ptr<G> group;

  template <class... A>
  explicit Holder(std::shared_ptr<Engine> e, A&&... rest)
      : engine(std::move(e)), group(std::make_unique<G>(*engine, std::forward<A>(rest)...)) {}
  ~Holder() { close(); }
  void close() {
    if (group) engine->close(std::move(group));
  }
  G& get() {
    if (!group) throw Failed({FailureKind::aborted, -1, "this communicator was closed"});
    return *group;
  }
};

// What a ledger counts of one operation.
struct Entry {
  std::uint64_t calls = 0;
  std::uint64_t payload_bytes = 0;
};

struct Member : Holder<Group> {
  using Holder::Holder;
  std::shared_ptr<Entry> reduced = std::make_shared<Entry>();  // may be another group's
};
using NetworkMember = Holder<NetworkGroup>;
using MixedMember = Holder<MixedGroup>;

// A transport that the engine serves for as long as Python or a group holds it.
struct Network {
  std::shared_ptr<Engine> engine;
  std::shared_ptr<TcpTransport> transport;

  Network(std::shared_ptr<Engine> e, int rank, int size, const nb::bytes& secret, const nb::bytes& session,
          const std::string& interfaces, const std::string& towards)
      : engine(std::move(e)) {
    TcpOptions options;
    options.rank = rank;
    options.size = size;
    const auto bytes = [](const nb::bytes& b) {
      const auto* p = reinterpret_cast<const std::byte*>(b.c_str());
      return std::vector<std::byte>(p, p + b.size());
    };
    options.secret = bytes(secret);
    options.session = bytes(session);
    options.interfaces = interfaces;
    if (!towards.empty()) options.towards = towards;
    transport = std::make_shared<TcpTransport>(options);
  }
  void set_peers(const std::vector<std::string>& endpoints) {
    transport->set_peers(endpoints);
    engine->add(transport);
  }
  void close() { engine->remove(transport); }
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

// nullptr when it is done already and well: the common case costs no object.
template <Engine::Return returns = soon, class M>
OperationPointer submit(M& m, Request&& request, double timeout_s, std::uint64_t announced = 0) {
  const auto timeout = static_cast<Nanoseconds>(timeout_s * 1e9);
  OperationPointer op = m.engine->submit(m.get(), std::move(request), timeout, announced, returns);
  if (!op->is_done.load()) return op;
  if (op->failure) throw Failed(op->failure);
  return nullptr;
}

Request basic(int kind, std::uintptr_t source, std::uintptr_t output, std::size_t numel, int dtype) {
  Request r;
  r.kind = static_cast<Kind>(kind);
  r.dtype = static_cast<DType>(dtype);
  r.source = reinterpret_cast<const std::byte*>(source);
  r.output = reinterpret_cast<std::byte*>(output);
  r.numel = numel;
  return r;
}

template <class M, Engine::Return returns = soon>
OperationPointer combine(M& m, int kind, std::uintptr_t source, std::uintptr_t output, std::size_t numel,
                         int dtype, int op, int root, const Counts& counts, double timeout_s) {
  Request r = basic(kind, source, output, numel, dtype);
  r.op = static_cast<ReduceOp>(op);
  r.root = root;
  if (!counts.empty()) r.parts = ranges(counts, size_of(r.dtype));
  return submit<returns>(m, std::move(r), timeout_s);
}

// In place. A small one is over before it pays to release the interpreter. Returns None when it is done, False for
// what is not contiguous CPU memory with such an operator, an Operation while it is in flight.
template <Engine::Return returns>
nb::object all_reduce(Member& m, nb::handle tensor, int op, double timeout_s) {
  const auto memory = memory_of(tensor);
  if (!memory || !is_reducible(memory->dtype, static_cast<ReduceOp>(op)))
    return nb::bool_(false);
  ++m.reduced->calls;
  m.reduced->payload_bytes += memory->numel * size_of(memory->dtype);
  const SmallReduce call{memory->data, memory->numel, memory->dtype, static_cast<ReduceOp>(op)};
  Group::Quick quick;
  if (m.group && m.group->is_alone()) quick = m.engine->quick(*m.group, call);
  if (quick.is_done) return nb::none();
  OperationPointer pending;
  {
    const nb::gil_scoped_release released;
    const auto data = reinterpret_cast<std::uintptr_t>(call.data);
    Request r = basic(static_cast<int>(Kind::all_reduce), data, data, call.numel, static_cast<int>(call.dtype));
    r.op = call.op;
    pending = submit<returns>(m, std::move(r), timeout_s, quick.announced);
  }
  return pending ? nb::cast(std::move(pending)) : nb::none();
}

template <class M, Engine::Return returns = soon>
OperationPointer exchange(M& m, int kind, std::uintptr_t source, std::uintptr_t output, std::size_t numel,
                          int dtype, int root, const Counts& send, const Counts& receive, bool is_same_for_all,
                          double timeout_s) {
  Request r = basic(kind, source, output, numel, dtype);
  r.root = root;
  r.send = ranges(send, size_of(r.dtype));
  r.receive = ranges(receive, size_of(r.dtype));
  r.is_same_for_all = is_same_for_all;
  return submit<returns>(m, std::move(r), timeout_s);
}

// As exchange, for tensors that lie anywhere: `send[i]` bytes at `sources[i]` and so on, one for each rank, or one
// for all if it is the same.
template <Engine::Return returns>
OperationPointer exchange_lists(Member& m, int kind, const std::vector<std::uintptr_t>& sources, const Counts& send,
                                const std::vector<std::uintptr_t>& outputs, const Counts& receive, std::size_t numel,
                                int dtype, bool is_same_for_all, double timeout_s) {
  const auto place = [](const std::vector<std::uintptr_t>& at, const Counts& num_bytes, std::vector<Range>& ranges) {
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
  Request r = basic(static_cast<int>(Kind::send), source, 0, numel, dtype);
  r.root = peer;
  r.tag = tag;
  return submit(m, std::move(r), timeout_s);
}

template <class M>
OperationPointer receive(M& m, std::uintptr_t output, std::size_t numel, int dtype, int peer, std::int64_t tag,
                         double timeout_s) {
  Request r = basic(static_cast<int>(Kind::receive), 0, output, numel, dtype);
  r.root = peer;
  r.tag = tag;
  // From anybody: the operation knows who it was, so it is returned also when it is done.
  if (peer == any_rank) return m.engine->submit(m.get(), std::move(r), static_cast<Nanoseconds>(timeout_s * 1e9));
  return submit(m, std::move(r), timeout_s);
}

// A negative timeout waits as long as the operation's own deadline.
template <class M>
void wait(M& m, Operation& op, double timeout_s) {
  if (!m.engine->wait(op, timeout_s < 0 ? -1 : static_cast<Nanoseconds>(timeout_s * 1e9)) && m.group)
    m.engine->expire(*m.group, op);
  if (op.failure) throw Failed(op.failure);
}

OperationPointer run(NetworkMember& m, const std::shared_ptr<Plan>& plan, int kind, std::uintptr_t source,
                     std::uintptr_t output, std::size_t numel, int dtype, int op, int root, double timeout_s) {
  Request r = basic(kind, source, output, numel, dtype);
  r.op = static_cast<ReduceOp>(op);
  r.root = root;
  r.plan = plan;
  return submit(m, std::move(r), timeout_s);
}

// What groups of both kinds offer.
template <class M>
nb::class_<M>& shared_methods(nb::class_<M>& type) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  return type.def("combine", &combine<M>, release())
      .def("exchange", &exchange<M>, release())
      .def("send", &send<M>, release())
      .def("receive", &receive<M>, release())
      .def("wait", &wait<M>, release())
      .def("poll", [](M& g, Operation& op) { return g.engine->poll(op); }, release())
      .def("abort", [](M& g, const std::string& why) {
        if (g.group) g.engine->abort(*g.group, {FailureKind::aborted, -1, why});
      }, release())
      .def("close", &M::close, release());
}

nb::object allocate(const std::shared_ptr<Engine>& engine, std::size_t num_bytes) {
  struct Block {
    std::shared_ptr<Engine> engine;
    void* pointer;
  };
  void* p = engine->arena().allocate(num_bytes);
  nb::capsule owner(new Block{engine, p}, [](void* self) noexcept {
    const std::unique_ptr<Block> block(static_cast<Block*>(self));
    if (!block->engine->is_forked_child()) block->engine->arena().free(block->pointer);
  });
  return nb::cast(nb::ndarray<std::uint8_t, nb::ndim<1>, nb::device::cpu>(p, {num_bytes}, owner));
}

void raise_as_python(const std::exception_ptr& error, void*) {
  try {
    std::rethrow_exception(error);
  } catch (const Failed& failed) {
    static constexpr const char* names[] = {"CommError",     "PeerLost",    "Timeout",  "Mismatch",
                                            "ProtocolError", "ConfigError", "CommError"};
    const nb::object type = nb::module_::import_("paceline.errors").attr(names[static_cast<int>(failed.failure.kind)]);
    PyErr_SetString(type.ptr(), failed.failure.detail.c_str());
  }
}

}  // namespace

void bind_fabric(nb::module_& m) {
  nb::register_exception_translator(raise_as_python);
  using release = nb::call_guard<nb::gil_scoped_release>;

  m.def("reduce", [](int dtype, int op, const std::vector<std::uintptr_t>& to, const std::vector<std::uintptr_t>& from,
                     std::size_t numel, int divisor) {
    paceline::reduce(static_cast<DType>(dtype), static_cast<ReduceOp>(op), reinterpret_cast<void* const*>(to.data()),
                     static_cast<int>(to.size()), reinterpret_cast<const void* const*>(from.data()),
                     static_cast<int>(from.size()), numel, divisor);
  }, release(), "Combine `from` element by element into every one of `to`.");
  m.def("is_reducible", [](int dtype, int op) {
    return is_reducible(static_cast<DType>(dtype), static_cast<ReduceOp>(op));
  }, "Whether the operator has a meaning for the dtype.");
  m.def("scale", [](std::uintptr_t to, std::uintptr_t from, std::size_t numel, float factor) {
    scale(reinterpret_cast<float*>(to), reinterpret_cast<const float*>(from), numel, factor);
  }, release(), "to = from * factor of float32 numbers, past the caches.");
  m.attr("EAGER_BYTES") = Outbox::eager_bytes;
  m.def("eager_reduce_bytes", &Outbox::eager_reduce_bytes, "Up to which size reductions of P ranks are eager.");
  m.def("reduce_isa", &reduce_isa, "Instruction set of the reduction kernels.");

  nb::class_<Operation>(m, "Operation")
      .def_prop_ro("is_done", [](Operation& op) { return op.is_done.load(); })
      .def("raise_failure", [](Operation& op) { if (op.is_done.load() && op.failure) throw Failed(op.failure); })
      .def_prop_ro("peer", [](Operation& op) { return op.request.root; });

  nb::class_<Engine>(m, "Engine")
      .def(nb::init<>())
      .def("allocate", &allocate)
      .def("set_ranks_on_host", &Engine::set_ranks_on_host)
      .def("stop", &Engine::stop, release())
      .def("watch", [](Engine& e, Operation& op, std::uint64_t token) { return e.completions().watch(op, token); })
      .def("take_completed", [](Engine& e, double timeout_s, std::size_t most) {
        return e.completions().take(static_cast<Nanoseconds>(timeout_s * 1e9), most);
      }, release())
      .def("close_completions", [](Engine& e) { e.completions().close(); })
      .def("num_closing_groups", &Engine::num_closing_groups, release())
      .def("is_shared", [](Engine& e, std::uintptr_t p, std::size_t n) {
        return e.arena().locate(reinterpret_cast<void*>(p), n).is_shared();
      })
      .def_prop_ro("num_segments", [](Engine& e) { return e.arena().num_segments(); })
      .def_prop_ro("allocated_bytes", [](Engine& e) { return e.arena().allocated_bytes(); });

  nb::class_<Entry>(m, "Entry").def_rw("calls", &Entry::calls).def_rw("payload_bytes", &Entry::payload_bytes);

  nb::class_<Member> group(m, "Group");
  group
      .def(nb::init<std::shared_ptr<Engine>, int, int>())
      .def_prop_ro("address", [](Member& g) -> PlainAddress {
        const Address a = g.get().address();
        return {a.pid, a.control_fd, a.outbox.slot, a.outbox.generation, a.outbox.offset};
      })
      .def("connect", [](Member& g, const std::vector<PlainAddress>& plain) {
        std::vector<Address> addresses;
        for (const auto& [pid, fd, slot, generation, offset] : plain)
          addresses.push_back({pid, fd, {slot, generation, offset}});
        g.engine->connect(g.get(), addresses);
      }, release())
      .def_rw("reduced", &Member::reduced)
      .def("all_reduce", &all_reduce<soon>)
      .def("all_reduce_now", &all_reduce<when_done>)
      .def("combine_now", &combine<Member, when_done>, release())
      .def("exchange_now", &exchange<Member, when_done>, release())
      .def("exchange_lists", &exchange_lists<soon>, release())
      .def("exchange_lists_now", &exchange_lists<when_done>, release());
  shared_methods(group);

  nb::class_<Network>(m, "Network")
      .def(nb::init<std::shared_ptr<Engine>, int, int, const nb::bytes&, const nb::bytes&, const std::string&,
                    const std::string&>())
      .def_prop_ro("endpoints", [](Network& n) { return n.transport->endpoints(); })
      .def_prop_ro("wire_bytes", [](Network& n) {
        std::uint64_t sent = 0;
        const nb::gil_scoped_release released;
        n.engine->locked([&] { sent = n.transport->wire_bytes_sent(); });
        return sent;
      })
      .def("set_peers", &Network::set_peers, release())
      .def("close", &Network::close, release());

  nb::class_<NetworkMember> network_group(m, "NetworkGroup");
  network_group
      .def("__init__", [](NetworkMember* self, const Network& n, std::uint32_t id, int rank,
                          const std::vector<int>& world_ranks) {
        new (self) NetworkMember(n.engine, std::shared_ptr<Transport>(n.transport), id, rank, world_ranks);
        const nb::gil_scoped_release released;
        n.engine->locked([&] { self->group->watch(); });
      })
      .def("run", &run, release());
  shared_methods(network_group);

  nb::class_<MixedMember> mixed_group(m, "MixedGroup");
  mixed_group.def("__init__", [](MixedMember* self, int rank, const std::vector<int>& hosts, Member& local,
                                 NetworkMember& world, NetworkMember* stripe) {
    new (self) MixedMember(local.engine, rank, hosts, local.get(), world.get(), stripe ? &stripe->get() : nullptr);
  }, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
                  nb::keep_alive<1, 6>());
  shared_methods(mixed_group);
}

}  // namespace paceline::bind
