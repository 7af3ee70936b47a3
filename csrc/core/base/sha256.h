// SHA-256 (FIPS 180-4) and HMAC (RFC 2104): connections are authenticated with the job's secret.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace paceline {

using Digest = std::array<std::byte, 32>;

class Sha256 {
 public:
  void update(std::span<const std::byte> data);
  // The digest of everything so far; the object must not be used afterwards.
  Digest finish();

 private:
  void compress(const std::byte* block);

  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::byte, 64> block_{};
  std::uint64_t num_bytes_ = 0;
};

Digest sha256(std::span<const std::byte> data);
Digest hmac_sha256(std::span<const std::byte> key, std::span<const std::byte> data);

// Takes the same time wherever the first difference is.
bool equal_in_constant_time(const Digest& a, const Digest& b);

}  // namespace paceline
