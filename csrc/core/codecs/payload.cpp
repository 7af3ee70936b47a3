#include "core/codecs/payload.h"

#include <atomic>
#include <bit>
#include <string>

#include "core/codecs/isa.h"
#include "core/base/crc32c.h"

namespace paceline::codec {

static_assert(std::endian::native == std::endian::little, "payloads are little-endian");

namespace {

std::atomic<int> isa_limit{static_cast<int>(Isa::avx512)};

Isa detect() {
#if PACELINE_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) return Isa::avx2;
#endif
  return Isa::scalar;
}

template <class T>
void put(std::uint8_t* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

template <class T>
T get(const std::uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

[[noreturn]] void reject(const std::string& why) { throw PayloadError(why); }

std::uint32_t checksum(const std::uint8_t* payload, std::size_t bytes) {
  const std::uint32_t head = crc32c(0, payload, header_bytes - 4);
  return crc32c(head, payload + header_bytes, bytes - header_bytes);
}

constexpr Decoder decoders[] = {nullptr,     decode_fp16,   decode_bf16,      decode_int8,
                                decode_int4, decode_onebit, decode_threshold, decode_topk};
constexpr std::uint8_t num_ids = sizeof decoders / sizeof decoders[0];

}  // namespace

Isa isa() {
  static const Isa best = detect();
  const int limit = isa_limit.load(std::memory_order_relaxed);
  return static_cast<int>(best) < limit ? best : static_cast<Isa>(limit);
}

void limit_isa(Isa limit) { isa_limit.store(static_cast<int>(limit), std::memory_order_relaxed); }

const char* name_of(CodecId id) {
  static constexpr const char* names[] = {"any",  "fp16",   "bf16",      "int8",
                                          "int4", "onebit", "threshold", "topk"};
  return static_cast<std::uint8_t>(id) < num_ids ? names[static_cast<std::uint8_t>(id)] : "unknown";
}

std::size_t finish_payload(const PayloadHeader& header, std::uint8_t* out, std::size_t body_bytes) {
  put(out, payload_magic);
  put(out + 4, payload_version);
  put(out + 5, header.id);
  put(out + 6, header.source);
  put(out + 7, static_cast<std::uint8_t>((header.has_checksum ? 1u : 0u) |
                                         (static_cast<std::uint32_t>(header.layout) << 1)));
  put(out + 8, header.numel);
  put(out + 16, header.parameter);
  put(out + 20, header.scale);
  put(out + 24, header.count);
  const std::size_t bytes = header_bytes + body_bytes;
  put(out + 28, header.has_checksum ? checksum(out, bytes) : 0u);
  return bytes;
}

PayloadHeader read_header(const std::uint8_t* payload, std::size_t payload_bytes, CodecId expected) {
  if (payload_bytes < header_bytes) {
    reject("codec payload of " + std::to_string(payload_bytes) + " bytes; its header alone has 32");
  }
  if (get<std::uint32_t>(payload) != payload_magic) {
    reject("not a codec payload: the magic bytes PLC1 are missing");
  }
  const auto version = get<std::uint8_t>(payload + 4);
  if (version != payload_version) {
    reject("codec payload of version " + std::to_string(version) +
           "; this build reads version 1: use one build "
           "of Paceline on all workers");
  }
  const auto id = get<std::uint8_t>(payload + 5);
  if (id == 0 || id >= num_ids) reject("codec payload of unknown codec number " + std::to_string(id));
  PayloadHeader header;
  header.id = static_cast<CodecId>(id);
  const std::string name = name_of(header.id);
  if (expected != CodecId::any && expected != header.id) {
    reject("a payload of codec " + name + " was given to codec " + name_of(expected));
  }
  const auto source = get<std::uint8_t>(payload + 6);
  const auto flags = get<std::uint8_t>(payload + 7);
  if (source > 3 || flags > 5) reject(name + " payload: unknown dtype or flags");
  header.source = static_cast<SourceType>(source);
  header.has_checksum = (flags & 1u) != 0;
  header.layout = static_cast<BodyLayout>(flags >> 1);
  header.numel = get<std::uint64_t>(payload + 8);
  header.parameter = get<std::uint32_t>(payload + 16);
  header.scale = get<float>(payload + 20);
  header.count = get<std::uint32_t>(payload + 24);
  if (header.numel > max_numel) reject(name + " payload: more than 2^31 - 1 elements");
  if (header.count > header.numel) reject(name + " payload: more hits than elements");
  const auto stored = get<std::uint32_t>(payload + 28);
  if (stored != (header.has_checksum ? checksum(payload, payload_bytes) : 0u)) {
    reject(name + " payload: the CRC-32C does not match; the bytes were damaged on the way");
  }
  const bool is_sparse = header.id == CodecId::threshold || header.id == CodecId::topk;
  if (!is_sparse && (header.layout != BodyLayout::words || header.count != 0 || bits_of(header.scale) != 0)) {
    reject(name + " payload: fields that only sparse payloads use are set");
  }
  return header;
}

void decode(const std::uint8_t* payload, std::size_t payload_bytes, CodecId expected, float* out,
            std::size_t numel, bool accumulate) {
  const PayloadHeader header = read_header(payload, payload_bytes, expected);
  if (header.numel != numel) {
    reject(std::string(name_of(header.id)) + " payload: holds " + std::to_string(header.numel) +
           " elements, but the tensor to decode into has " + std::to_string(numel));
  }
  const Decoder decode_body = decoders[static_cast<std::uint8_t>(header.id)];
  decode_body(header, payload + header_bytes, payload_bytes - header_bytes, out, accumulate);
}

void check_encoder(CodecId id, std::size_t numel, std::size_t needed, std::size_t capacity) {
  if (numel > max_numel) {
    throw ArgumentError(std::string(name_of(id)) + ": at most 2^31 - 1 elements per tensor");
  }
  if (capacity < needed) {
    throw ArgumentError(std::string(name_of(id)) + ": the output has " + std::to_string(capacity) +
                        " bytes, max_encoded_bytes is " + std::to_string(needed));
  }
}

void check_body(const PayloadHeader& header, std::size_t body_bytes, std::size_t expected) {
  if (body_bytes != expected) {
    reject(std::string(name_of(header.id)) + " payload: a body of " + std::to_string(expected) +
           " bytes expected for " + std::to_string(header.numel) + " elements, got " +
           std::to_string(body_bytes));
  }
}

void check_block(const PayloadHeader& header) {
  const std::uint32_t block = header.parameter;
  if (block < 32 || block > 4096 || (block & (block - 1)) != 0) {
    reject(std::string(name_of(header.id)) + " payload: block length " + std::to_string(block) +
           " is not a power of two from 32 to 4096");
  }
}

}  // namespace paceline::codec
