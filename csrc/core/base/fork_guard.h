// Tells a process from the children that fork() makes of it: a child shares memory with peers that do not
// know it, so it must not touch anything.
#pragma once
#include <pthread.h>

#include <atomic>
#include <cstdint>

namespace paceline {

class ForkGuard {
 public:
  ForkGuard() : born_after_(count_forks()) {}
  // True in a child that was forked after this object was made.
  bool is_child() const { return num_forks.load(std::memory_order_relaxed) != born_after_; }

 private:
  static std::uint32_t count_forks() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1); });
    (void)registered;
    return num_forks.load();
  }

  static inline std::atomic<std::uint32_t> num_forks{0};  // between the first guarded process and this one
  std::uint32_t born_after_;
};

}  // namespace paceline
