// What all ranks must agree on when they make a collective call.
#pragma once
#include <cstdint>
#include <string>

#include "core/engine/operation.h"

namespace paceline {

struct CollectiveCall {
  std::uint32_t kind = 0, dtype = 0, op = 0, root = 0;  // as received from a peer: not checked
  std::uint64_t numel = 0;

  static CollectiveCall of(const Request& request);
  // "all_reduce(10 x float32, sum, root 0)"
  std::string text() const;
  bool operator==(const CollectiveCall&) const = default;
};

// The failure of a rank whose peer `rank`, called `name` in messages, made another call.
Failure mismatch(const CollectiveCall& ours, const CollectiveCall& theirs, int rank, const std::string& name);

}  // namespace paceline
