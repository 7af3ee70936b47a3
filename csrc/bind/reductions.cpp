// The reduction kernels, and the codes of dtypes and operators: Python takes both from here.
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <vector>

#include "bind/bind.h"
#include "core/base/reduce.h"

namespace nb = nanobind;

namespace paceline::bind {
namespace {

// The names by code.
template <class E>
nb::tuple names(int count) {
  nb::list found;
  for (int code = 0; code < count; ++code) found.append(name_of(static_cast<E>(code)));
  return nb::tuple(found);
}

void reduce_all(int dtype, int op, const std::vector<std::uintptr_t>& to,
                const std::vector<std::uintptr_t>& from, std::size_t numel, int divisor) {
  reduce(static_cast<DType>(dtype), static_cast<ReduceOp>(op), reinterpret_cast<void* const*>(to.data()),
         static_cast<int>(to.size()), reinterpret_cast<const void* const*>(from.data()),
         static_cast<int>(from.size()), numel, divisor);
}

}  // namespace

void bind_reductions(nb::module_& m) {
  using release = nb::call_guard<nb::gil_scoped_release>;
  m.attr("DTYPES") = names<DType>(num_dtypes);
  m.attr("REDUCE_OPS") = names<ReduceOp>(num_reduce_ops);
  m.def(
      "is_reducible",
      [](int dtype, int op) { return is_reducible(static_cast<DType>(dtype), static_cast<ReduceOp>(op)); },
      nb::arg("dtype"), nb::arg("op"), "Whether the operator has a meaning for the dtype.");
  m.def("reduce", &reduce_all, release(), nb::arg("dtype"), nb::arg("op"), nb::arg("to"), nb::arg("source"),
        nb::arg("numel"), nb::arg("divisor"),
        "Combine the memory at each `source` element by element into each `to`.");
  m.def(
      "scale",
      [](std::uintptr_t to, std::uintptr_t from, std::size_t numel, float factor) {
        scale(reinterpret_cast<float*>(to), reinterpret_cast<const float*>(from), numel, factor);
      },
      release(), "to = from * factor of float32 numbers, past the caches.");
  m.def("reduce_isa", &reduce_isa, "The instruction set of the reduction kernels.");
}

}  // namespace paceline::bind
