#include "core/engine/call.h"

namespace paceline {

CollectiveCall CollectiveCall::of(const Request& request) {
  CollectiveCall call;
  call.kind = static_cast<std::uint32_t>(request.kind);
  call.dtype = static_cast<std::uint32_t>(request.dtype);
  if (is_reduction(request.kind)) call.op = static_cast<std::uint32_t>(request.op);
  call.root = static_cast<std::uint32_t>(request.root);
  call.numel = request.numel;
  return call;
}

std::string CollectiveCall::text() const {
  if (kind >= num_kinds || dtype >= num_dtypes || op >= num_reduce_ops) return "something unknown";
  std::string text = name_of(static_cast<OperationKind>(kind));
  text += "(" + std::to_string(numel) + " x " + name_of(static_cast<DType>(dtype));
  if (is_reduction(static_cast<OperationKind>(kind)))
    text += std::string(", ") + name_of(static_cast<ReduceOp>(op));
  return text + ", root " + std::to_string(root) + ")";
}

Failure mismatch(const CollectiveCall& ours, const CollectiveCall& theirs, int rank,
                 const std::string& name) {
  return {FailureKind::mismatch, rank,
          "this rank called " + ours.text() + " but " + name + " called " + theirs.text() +
              ": all ranks must make the same calls in the same order"};
}

}  // namespace paceline
