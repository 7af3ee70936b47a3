// CRC-32C (Castagnoli, RFC 3720): detects corrupted messages and checkpoint shards.
#pragma once
#include <cstddef>
#include <cstdint>

namespace paceline {

// Continues `crc` (0 to start) over `size` bytes. Chaining calls equals one call over the concatenation.
std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t size);

}  // namespace paceline
