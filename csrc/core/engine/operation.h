// One call on a group: its arguments and its progress.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/base/dtype.h"
#include "core/base/failure.h"
#include "core/base/ranks.h"
#include "core/base/sync.h"
#include "core/base/task.h"

namespace paceline {

enum class OperationKind : std::uint8_t {
  // reductions
  all_reduce,
  reduce,
  reduce_scatter,
  // exchanges
  broadcast,
  all_gather,
  gather,
  scatter,
  all_to_all,
  barrier,
  // messages
  send,
  receive,
};
inline constexpr int num_kinds = 11;
const char* name_of(OperationKind kind);
constexpr bool is_reduction(OperationKind kind) { return kind <= OperationKind::reduce_scatter; }

struct Plan;

struct Range {
  std::size_t offset = 0;
  std::size_t num_bytes = 0;
};

struct Request {
  OperationKind kind = OperationKind::barrier;
  DType dtype = DType::uint8;
  ReduceOp op = ReduceOp::sum;
  int root = 0;  // of messages: the peer; any_rank is allowed when receiving
  std::int64_t tag = 0;
  const std::byte* source = nullptr;
  std::byte* output = nullptr;
  std::size_t numel = 0;             // what all ranks must agree on
  std::vector<Range> parts;          // of reductions: the part of `source` that each rank reduces
  std::vector<Range> send;           // of exchanges: what each rank gets of `source`
  std::vector<Range> receive;        // of exchanges: the place in `output` of what each rank sends
  bool is_same_for_all = false;      // of exchanges: every receiver gets send[0]
  std::shared_ptr<const Plan> plan;  // over the network: the program that this rank runs, if any
};

// An all_reduce that may be small enough to be done in the caller's thread without an Operation.
struct SmallReduce {
  std::byte* data;
  std::size_t numel;
  DType dtype;
  ReduceOp op;
};

struct Operation {
  Request request;
  std::uint64_t sequence = 0;
  Nanoseconds deadline = 0;
  Nanoseconds started = 0;
  bool is_announced = false;  // peers have seen it before it was queued
  bool is_heavy = false;  // moves enough bytes that the helper should do it instead of the submitting thread
  Task task;
  int waiting_for = -1;     // the rank whose data or answer is missing; -1: none known
  std::uint64_t token = 0;  // of Completions, which guards it; 0: no notification is wanted
  std::atomic<bool> is_done{false};
  Failure failure;  // valid once is_done
};

using OperationPointer = std::shared_ptr<Operation>;

}  // namespace paceline
