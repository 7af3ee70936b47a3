#include "core/codecs/rice.h"

#include <bit>
#include <cstring>

namespace paceline::codec {
namespace {

class BitWriter {
 public:
  explicit BitWriter(std::uint8_t* out) : out_(out) {}

  void put(std::uint64_t value, std::uint32_t bits) {  // bits <= 32
    window_ |= value << filled_;
    filled_ += bits;
    while (filled_ >= 8) {
      *out_++ = static_cast<std::uint8_t>(window_);
      window_ >>= 8;
      filled_ -= 8;
    }
  }

  void put_unary(std::uint64_t zeros) {
    for (; zeros >= 32; zeros -= 32) put(0, 32);
    put(1ull << zeros, static_cast<std::uint32_t>(zeros) + 1);
  }

  void finish() {
    if (filled_ > 0) *out_++ = static_cast<std::uint8_t>(window_);
  }

 private:
  std::uint8_t* out_;
  std::uint64_t window_ = 0;
  std::uint32_t filled_ = 0;
};

std::uint64_t bits_with(const std::uint32_t* words, std::size_t count, std::uint32_t parameter,
                        bool has_sign) {
  std::uint64_t bits = static_cast<std::uint64_t>(count) * (1 + parameter + (has_sign ? 1 : 0));
  std::uint32_t expected = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t index = words[i] & index_mask;
    bits += (index - expected) >> parameter;
    expected = index + 1;
  }
  return bits;
}

[[noreturn]] void reject(const char* why) {
  throw PayloadError(std::string("entropy-coded payload: ") + why);
}

}  // namespace

RicePlan plan_rice(const std::uint32_t* words, std::size_t count, bool has_sign) {
  if (count == 0) return {0, 0};
  const std::uint64_t mean_gap = (words[count - 1] & index_mask) / count;
  const auto middle = static_cast<std::uint32_t>(std::bit_width(mean_gap));
  RicePlan best{0, ~std::size_t{0}};
  const std::uint32_t first = middle > 2 ? middle - 2 : 0;
  for (std::uint32_t k = first; k <= middle && k <= max_rice_parameter; ++k) {
    const std::size_t bytes = (bits_with(words, count, k, has_sign) + 7) / 8;
    if (bytes < best.bytes) best = {k, bytes};
  }
  return best;
}

void write_rice(const std::uint32_t* words, std::size_t count, bool has_sign, RicePlan plan,
                std::uint8_t* bytes) {
  BitWriter writer(bytes);
  std::uint32_t expected = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t index = words[i] & index_mask;
    const std::uint64_t gap = index - expected;
    expected = index + 1;
    writer.put_unary(gap >> plan.parameter);
    writer.put(gap & ((1ull << plan.parameter) - 1), plan.parameter);
    if (has_sign) writer.put(words[i] >> 31, 1);
  }
  writer.finish();
}

void RiceReader::refill() {
  while (available_ <= 56 && position_ < size_) {
    window_ |= static_cast<std::uint64_t>(bytes_[position_++]) << available_;
    available_ += 8;
  }
}

std::uint64_t RiceReader::take(std::uint32_t bits) {  // bits <= 31
  refill();
  if (available_ < bits) reject("it ends in the middle of a hit");
  const std::uint64_t value = window_ & ((1ull << bits) - 1);
  window_ >>= bits;
  available_ -= bits;
  return value;
}

std::uint32_t RiceReader::next() {
  std::uint64_t zeros = 0;
  refill();
  while (window_ == 0) {
    if (available_ == 0 || (zeros >> 31) != 0) reject("it ends in the middle of a hit");
    zeros += available_;
    available_ = 0;
    refill();
  }
  const auto run = static_cast<std::uint32_t>(std::countr_zero(window_));
  zeros += run;
  window_ >>= run;
  window_ >>= 1;
  available_ -= run + 1;
  if (zeros > max_numel) reject("a gap beyond the tensor's end");
  const std::uint64_t index = next_index_ + (zeros << parameter_) + take(parameter_);
  if (index >= numel_) reject("an index beyond the tensor's end");
  next_index_ = index + 1;
  const auto sign = static_cast<std::uint32_t>(has_sign_ ? take(1) : 0);
  return static_cast<std::uint32_t>(index) | (sign << 31);
}

void RiceReader::expect_end() const {
  if (position_ != size_ || available_ >= 8 || window_ != 0) reject("bytes left over after the last hit");
}

}  // namespace paceline::codec
