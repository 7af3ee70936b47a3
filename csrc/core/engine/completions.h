// Notification of finished operations without a thread that waits for each: a queue of tokens.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "core/engine/operation.h"

namespace paceline {

class Completions {
 public:
  // `token` will be taken once `op` is done; false if it is done already.
  bool watch(Operation& op, std::uint64_t token) {
    const std::lock_guard lock(mutex_);
    if (op.is_done.load()) return false;
    op.token = token;
    return true;
  }

  // To be called after `op.is_done` was set.
  void completed(const Operation& op) {
    {
      const std::lock_guard lock(mutex_);
      if (op.token == 0) return;
      tokens_.push_back(op.token);
    }
    arrived_.notify_one();
  }

  // Tokens of finished operations, at most `most`; none when `timeout` passes or the queue was closed.
  // Several threads may wait: each token goes to one.
  std::vector<std::uint64_t> take(Nanoseconds timeout, std::size_t most) {
    std::unique_lock lock(mutex_);
    arrived_.wait_for(lock, std::chrono::nanoseconds(timeout),
                      [&] { return is_closed_ || !tokens_.empty(); });
    if (tokens_.size() <= most) return std::exchange(tokens_, {});
    const auto end = tokens_.begin() + static_cast<std::ptrdiff_t>(most);
    std::vector<std::uint64_t> taken(tokens_.begin(), end);
    tokens_.erase(tokens_.begin(), end);
    return taken;
  }

  void close() {
    {
      const std::lock_guard lock(mutex_);
      is_closed_ = true;
    }
    arrived_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::vector<std::uint64_t> tokens_;
  bool is_closed_ = false;
};

}  // namespace paceline
