#include "core/shared_memory/cache_aware_copy.h"

#include <cstring>

#include "core/base/sync.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace paceline {
namespace {

constexpr std::size_t min_measured_bytes = 4 << 10;  // below this, reading the clock would cost too much
constexpr std::uint32_t copies_per_probe = 32;

void copy_past_caches(std::byte* to, const std::byte* from, std::size_t num_bytes) {
  std::size_t at = 0;
#if defined(__SSE2__)
  for (; at + 64 <= num_bytes; at += 64)
    for (std::size_t i = at; i < at + 64; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  _mm_sfence();  // a release does not order these stores
#endif
  std::memcpy(to + at, from + at, num_bytes - at);
}

}  // namespace

void CacheAwareCopy::copy(std::byte* to, const std::byte* from, std::size_t num_bytes) {
  if (num_bytes < min_measured_bytes) {
    if (num_bytes > 0) std::memcpy(to, from, num_bytes);
    return;
  }
  const bool is_probe = ++num_copies_ % copies_per_probe == 0;
  const bool is_past = goes_past_caches() != is_probe;
  const Nanoseconds start = now_ns();
  if (is_past) copy_past_caches(to, from, num_bytes);
  else std::memcpy(to, from, num_bytes);
  Cost& cost = cost_[is_past];
  cost.before = cost.last;
  cost.last = static_cast<double>(now_ns() - start) / (static_cast<double>(num_bytes) / 64.0);
}

}  // namespace paceline
