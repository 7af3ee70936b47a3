// Plan: the fields of an instruction by the names of schedule/lowering/lowered.py.
#include "core/network/plan.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bind/bind.h"

namespace nb = nanobind;

namespace paceline::bind {
namespace {

using PlainRanges = std::vector<std::tuple<int, std::size_t, std::size_t>>;

Plan::Ranges ranges_of(const PlainRanges& plain) {
  Plan::Ranges ranges;
  ranges.reserve(plain.size());
  for (const auto& [buffer, offset, num_bytes] : plain)
    ranges.push_back({static_cast<Plan::Buffer>(buffer), offset, num_bytes});
  return ranges;
}

void add(Plan& plan, const std::string& verb, int lane, int channel, int recv_peer, int send_peer,
         std::size_t num_bytes, const PlainRanges& dst, const PlainRanges& src, const PlainRanges& operand,
         const std::vector<int>& deps) {
  Plan::Instruction instruction;
  instruction.verb = verb_named(verb);
  instruction.lane = lane;
  instruction.channel = channel;
  instruction.recv_peer = recv_peer;
  instruction.send_peer = send_peer;
  instruction.num_bytes = num_bytes;
  instruction.dst = ranges_of(dst);
  instruction.src = ranges_of(src);
  instruction.operand = ranges_of(operand);
  instruction.deps = deps;
  plan.add(std::move(instruction));
}

}  // namespace

void bind_plan(nb::module_& m) {
  auto plan = nb::class_<Plan>(m, "Plan");
  plan.def(
          "__init__",
          [](Plan* self, int num_ranks, std::size_t scratch_bytes, std::size_t output_bytes) {
            new (self) Plan{};
            self->num_ranks = num_ranks;
            self->scratch_bytes = scratch_bytes;
            self->output_bytes = output_bytes;
          },
          nb::kw_only(), nb::arg("num_ranks"), nb::arg("scratch_bytes"), nb::arg("output_bytes"))
      .def("add", &add, nb::kw_only(), nb::arg("verb"), nb::arg("lane"), nb::arg("channel"),
           nb::arg("recv_peer"), nb::arg("send_peer"), nb::arg("num_bytes"), nb::arg("dst"), nb::arg("src"),
           nb::arg("operand"), nb::arg("deps"));
  plan.attr("VERBS") = nb::tuple(nb::cast(verb_names()));
}

}  // namespace paceline::bind
