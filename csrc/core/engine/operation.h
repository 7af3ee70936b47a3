// One call on a group: what was asked for, and how far it is.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/base/dtype.h"
#include "core/base/failure.h"
#include "core/base/sync.h"
#include "core/base/task.h"

namespace paceline {

enum class Kind : std::uint8_t {
  all_reduce, reduce, reduce_scatter,                            // combine
  broadcast, all_gather, gather, scatter, all_to_all, barrier,   // exchange
  send, receive,
};
inline constexpr int num_kinds = 11;
const char* name_of(Kind kind);

struct Plan;

struct Range {
  std::size_t offset = 0;
  std::size_t num_bytes = 0;
};

struct Request {
  Kind kind = Kind::barrier;
  DType dtype = DType::uint8;
  ReduceOp op = ReduceOp::sum;
  int root = 0;  // of point-to-point operations: the peer, any_rank allowed when receiving
  std::int64_t tag = 0;
  const std::byte* source = nullptr;
  std::byte* output = nullptr;
  std::size_t numel = 0;  // of the call's signature: what all ranks must agree on
  std::vector<Range> parts;    // combining: the part of `source` that each rank reduces
  std::vector<Range> send;     // exchanging: what each rank gets of `source`
  std::vector<Range> receive;  // exchanging: where what each rank sends goes in `output`
  bool is_same_for_all = false;  // every receiver gets send[0]
  std::shared_ptr<const Plan> plan;  // over the network: the program that this rank runs
};

// What an all_reduce is about, when it is small enough to be done at once.
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
  bool is_heavy = false;  // enough to move that a submit should not do it
  Task task;
  int waiting_for = -1;  // the rank whose move is missing
  std::uint64_t token = 0;  // of Completions, which guards it; 0: nobody is to be told
  std::atomic<bool> is_done{false};
  Failure failure;  // valid once is_done
};

using OperationPointer = std::shared_ptr<Operation>;

}  // namespace paceline
