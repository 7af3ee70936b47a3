// How other processes wake this one. It lies in memory that they share.
#pragma once
#include <atomic>
#include <cstdint>

#include "core/base/sync.h"

namespace paceline {

struct Doorbell {
  // Which thread of the owner sleeps: one that waits for an operation, or the helper that serves operations
  // which no thread waits for.
  enum Listener : std::uint32_t { nobody, waiter, helper };

  alignas(64) std::atomic<std::uint32_t> armed;     // the listener to wake
  alignas(64) std::atomic<std::uint32_t> bells[3];  // by listener: the word that it sleeps on
  alignas(64) std::atomic<std::uint32_t> beat;      // moves while the process runs, every 50 ms at least
  alignas(64) std::atomic<std::uint32_t> core;  // 1 + the core of the last wait for an operation; 0 at first

  // Wakes the owner if it sleeps. To be called after publishing something.
  void ring() {
    const std::uint32_t listener = armed.load() == nobody ? std::uint32_t{nobody} : armed.exchange(nobody);
    if (listener == waiter || listener == helper) wake(static_cast<Listener>(listener));
  }
  void wake(Listener listener) {
    bells[listener].fetch_add(1);
    futex_wake_all(bells[listener]);
  }
};
static_assert(sizeof(Doorbell) == 256);

}  // namespace paceline
