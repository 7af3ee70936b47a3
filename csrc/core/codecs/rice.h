// Golomb–Rice coding of increasing indexes: the gaps of random hits are geometric, for which it is near
// the entropy bound. Per hit: unary quotient, k remainder bits, optionally a sign bit; least bit first.
// Golomb, IEEE Trans. Inf. Theory 12(3), 1966; Rice & Plaunt, IEEE Trans. Commun. 19(6), 1971.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/codecs/payload.h"

namespace paceline::codec {

constexpr std::uint32_t max_rice_parameter = 30;
constexpr std::uint32_t index_mask = 0x7fffffffu;

struct RicePlan {
  std::uint32_t parameter;
  std::size_t bytes;
};

// The parameter with the fewest bytes for `words` (31-bit index + sign bit, indexes increasing).
RicePlan plan_rice(const std::uint32_t* words, std::size_t count, bool has_sign);

// Writes exactly plan.bytes.
void write_rice(const std::uint32_t* words, std::size_t count, bool has_sign, RicePlan plan,
                std::uint8_t* bytes);

// Reads hits one by one; throws PayloadError at the end of the bytes or for an index that is not < numel.
class RiceReader {
 public:
  RiceReader(const PayloadHeader& header, const std::uint8_t* bytes, std::size_t size, bool has_sign)
      : bytes_(bytes), size_(size), numel_(header.numel), parameter_(header.parameter), has_sign_(has_sign) {}

  // Index, with the sign in the top bit.
  std::uint32_t next();
  // Throws unless all bytes were used and the bits that fill the last one are zero.
  void expect_end() const;

 private:
  void refill();
  std::uint64_t take(std::uint32_t bits);

  const std::uint8_t* bytes_;
  std::size_t size_;
  std::size_t position_ = 0;
  std::uint64_t window_ = 0;
  std::uint32_t available_ = 0;
  std::uint64_t numel_;
  std::uint64_t next_index_ = 0;
  std::uint32_t parameter_;
  bool has_sign_;
};

}  // namespace paceline::codec
