// Feeds damaged payloads to every decoder; run under AddressSanitizer and UBSan. Each payload and each output
// is a heap block of exactly its size, so that one byte too far is seen.
//   codec_fuzz [iterations] [seed]     exits 0 and prints how many payloads were rejected and decoded
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "core/codecs/encode.h"
#include "core/codecs/isa.h"
#include "core/base/crc32c.h"

using namespace paceline::codec;
using Bytes = std::vector<std::uint8_t>;

namespace {

std::mt19937_64 chance;
std::size_t below(std::size_t limit) { return limit == 0 ? 0 : chance() % limit; }

Bytes valid_payload(std::size_t numel) {
  std::vector<float> x(numel), residual(numel, 0.0f);
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(chance);
  const bool has_checksum = below(4) == 0;
  const EncoderInput in{x.data(), residual.data(), numel, static_cast<SourceType>(below(4)), has_checksum};
  const std::size_t block = std::size_t{32} << below(3);
  const std::size_t count = below(numel + 1);
  const float taus[] = {0.05f, 1.0f, 2.0f, 3.0f};
  Bytes bytes(16 * numel + 4096);
  const EncoderOutput out{bytes.data(), bytes.size()};
  const Rounding rounding{below(2) == 0, chance()};
  std::uint64_t skipped = 0;
  std::size_t size = 0;
  switch (below(7)) {
    case 0: size = encode_fp16(in, block, out); break;
    case 1: size = encode_bf16(in, out); break;
    case 2: size = encode_int8(in, block, rounding, out); break;
    case 3: size = encode_int4(in, block, rounding, out); break;
    case 4: size = encode_onebit(in, block, out); break;
    case 5: size = encode_threshold(in, taus[below(4)], below(2) == 0, out, &skipped); break;
    default: size = encode_topk(in, count, below(2) == 0, out); break;
  }
  bytes.resize(size);
  return bytes;
}

void damage(Bytes& bytes) {
  static constexpr std::size_t fields[][2] = {{4, 1}, {5, 1},  {6, 1},  {7, 1},
                                              {8, 8}, {16, 4}, {20, 4}, {24, 4}};
  static constexpr std::uint64_t values[] = {0,    1,          31,         32,         63,
                                             4096, 0x7fffffff, 0x80000000, 0xffffffff, ~0ull};
  const std::size_t place = below(bytes.size());
  switch (below(7)) {
    case 0: bytes.resize(place); break;
    case 1: bytes.insert(bytes.end(), below(64), static_cast<std::uint8_t>(chance())); break;
    case 2:
      if (!bytes.empty()) bytes[place] ^= static_cast<std::uint8_t>(1u << below(8));
      break;
    case 3:
      if (!bytes.empty()) bytes[place] = static_cast<std::uint8_t>(chance());
      break;
    case 4:
      bytes.erase(bytes.begin() + static_cast<std::ptrdiff_t>(place),
                  bytes.begin() + static_cast<std::ptrdiff_t>(place + below(bytes.size() - place)));
      break;
    default:
      if (bytes.size() >= header_bytes) {
        const auto& field = fields[below(8)];
        const std::uint64_t value = below(3) == 0 ? chance() : values[below(10)];
        std::memcpy(bytes.data() + field[0], &value, field[1]);
      }
  }
}

// Half of the damaged payloads get a checksum that fits, so that damage reaches the decoders behind it.
void repair_checksum(Bytes& bytes) {
  if (bytes.size() < header_bytes || below(2) == 0) return;
  std::uint32_t checksum = 0;
  if (bytes[7] & 1u) {
    checksum = paceline::crc32c(0, bytes.data(), header_bytes - 4);
    checksum = paceline::crc32c(checksum, bytes.data() + header_bytes, bytes.size() - header_bytes);
  }
  std::memcpy(bytes.data() + 28, &checksum, 4);
}

}  // namespace

int main(int argc, char** argv) {
  const long iterations = argc > 1 ? std::atol(argv[1]) : 1000000;
  chance.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  long rejected = 0, decoded = 0;
  Bytes base;
  std::size_t base_numel = 0;
  for (long i = 0; i < iterations; ++i) {
    if (i % 16 == 0) base = valid_payload(base_numel = below(300));
    Bytes bytes = base;
    for (std::size_t n = below(4); n > 0; --n) damage(bytes);
    repair_checksum(bytes);
    std::size_t numel = base_numel;
    if (bytes.size() >= header_bytes && below(2) == 0) {  // agree to an announced size, if it is small
      std::uint64_t announced;
      std::memcpy(&announced, bytes.data() + 8, 8);
      if (announced < 5000) numel = announced;
    }
    const std::unique_ptr<std::uint8_t[]> payload(new std::uint8_t[bytes.size()]);
    if (!bytes.empty()) std::memcpy(payload.get(), bytes.data(), bytes.size());
    const std::unique_ptr<float[]> out(new float[numel]);
    for (std::size_t k = 0; k < numel; ++k) out[k] = 0.5f;
    limit_isa(static_cast<Isa>(below(3)));
    try {
      decode(payload.get(), bytes.size(), CodecId::any, out.get(), numel, below(2) == 0);
      ++decoded;
    } catch (const PayloadError& error) {
      ++rejected;
      for (std::size_t k = 0; k < numel; ++k) {
        if (out[k] != 0.5f) {
          std::fprintf(stderr, "output touched by a rejected payload: %s\n", error.what());
          return 1;
        }
      }
    }
  }
  std::printf("%ld payloads: %ld rejected, %ld decoded\n", iterations, rejected, decoded);
  return 0;
}
