// TCP transports of several ranks in one process, for tests.
#pragma once
#include <barrier>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <poll.h>

#include "check.h"
#include "core/tcp/tcp_transport.h"

namespace paceline {

inline std::vector<std::byte> bytes_of(const char* text) {
  const auto* p = reinterpret_cast<const std::byte*>(text);
  return {p, p + std::strlen(text)};
}

struct Mesh {
  std::vector<std::unique_ptr<TcpTransport>> ranks;

  explicit Mesh(int size, TcpOptions options = {}) {
    std::vector<std::string> endpoints;
    for (int r = 0; r < size; ++r) {
      options.rank = r, options.size = size;
      if (options.secret.empty()) options.secret = bytes_of("secret");
      ranks.push_back(std::make_unique<TcpTransport>(options));
      endpoints.push_back(ranks.back()->endpoints());
    }
    for (auto& t : ranks) t->set_peers(endpoints);
  }
  TcpTransport& operator[](int r) { return *ranks[static_cast<std::size_t>(r)]; }

  // Drives all ranks from one thread until `condition` holds; false if `seconds` pass first.
  template <class F>
  bool drive(F condition, double seconds = 20) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    while (!condition()) {
      if (std::chrono::steady_clock::now() > end) return false;
      for (auto& t : ranks)
        if (t) t->progress();
    }
    return true;
  }
};

struct Message : Transfer {
  std::vector<std::byte> memory;

  Message(int rank, Tag t, std::size_t n, int seed = -1, int urgency = 0) : memory(n) {
    peer = rank, tag = t, num_bytes = n, data = memory.data();
    priority = static_cast<std::uint8_t>(urgency);
    for (std::size_t i = 0; seed >= 0 && i < n; ++i) memory[i] = pattern(seed, i);
  }
  Message(const Message&) = delete;
  static std::byte pattern(int seed, std::size_t i) {
    return static_cast<std::byte>((i * 2654435761u + static_cast<std::size_t>(seed) * 97 + (i >> 8)) >> 3);
  }
  bool holds(int seed) const {
    for (std::size_t i = 0; i < memory.size(); ++i)
      if (memory[i] != pattern(seed, i)) return false;
    return true;
  }
  bool is_over() const { return state != State::pending; }
};

}  // namespace paceline
