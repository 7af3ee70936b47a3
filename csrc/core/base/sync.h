// Waiting between threads and processes: futex, pause, monotonic time.
#pragma once
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

namespace paceline {

using Nanoseconds = std::int64_t;
inline constexpr Nanoseconds second_ns = 1'000'000'000;
inline constexpr Nanoseconds millisecond_ns = 1'000'000;

inline Nanoseconds from_seconds(double seconds) { return static_cast<Nanoseconds>(seconds * 1e9); }

inline Nanoseconds now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return Nanoseconds{t.tv_sec} * second_ns + t.tv_nsec;
}

// Sleeps while `word` equals `expected`, at most `timeout` ns. Works across processes on shared memory.
inline void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected, Nanoseconds timeout) {
  timespec t{timeout / second_ns, timeout % second_ns};
  syscall(SYS_futex, &word, FUTEX_WAIT, expected, &t, nullptr, 0);
}

inline void futex_wake_all(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, 0x7fffffff, nullptr, nullptr, 0);
}

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace paceline
