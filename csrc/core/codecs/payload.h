// The self-describing payload of every codec: a 32-byte little-endian header, then the codec's own body.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace paceline::codec {

enum class CodecId : std::uint8_t {
  any = 0,
  fp16 = 1,
  bf16 = 2,
  int8 = 3,
  int4 = 4,
  onebit = 5,
  threshold = 6,
  topk = 7,
};

// How a sparse body is laid out.
enum class BodyLayout : std::uint8_t { words = 0, bitmap = 1, rice = 2 };

// The element type of the tensor that was encoded. The kernels themselves compute in float32.
enum class SourceType : std::uint8_t { float32 = 0, float16 = 1, bfloat16 = 2, float64 = 3 };

constexpr std::uint32_t payload_magic = 0x31434c50u;  // "PLC1"
constexpr std::uint8_t payload_version = 1;
constexpr std::size_t header_bytes = 32;
constexpr std::uint64_t max_numel = 0x7fffffffu;  // an index has 31 bits

struct PayloadHeader {
  CodecId id = CodecId::any;
  SourceType source = SourceType::float32;
  bool has_checksum = false;
  BodyLayout layout = BodyLayout::words;
  std::uint64_t numel = 0;
  std::uint32_t parameter = 0;  // block length, or Rice parameter
  float scale = 0.0f;           // τ of threshold
  std::uint32_t count = 0;      // hits of a sparse body
};

struct PayloadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

const char* name_of(CodecId id);

// Writes `header` before the `body_bytes` that already stand at out + header_bytes; returns the whole length.
std::size_t finish_payload(const PayloadHeader& header, std::uint8_t* out, std::size_t body_bytes);

// Reads and checks everything that does not depend on the codec. Throws PayloadError.
PayloadHeader read_header(const std::uint8_t* payload, std::size_t payload_bytes, CodecId expected);

// out[i] = decoded[i], or out[i] += decoded[i]. Everything is validated before `out` is touched.
// Throws PayloadError for bytes that are not a payload for `numel` elements of codec `expected` (any: any).
void decode(const std::uint8_t* payload, std::size_t payload_bytes, CodecId expected, float* out,
            std::size_t numel, bool accumulate);

// For encoders: throws ArgumentError unless `capacity` holds `needed` bytes and numel fits 31 bits.
void check_encoder(CodecId id, std::size_t numel, std::size_t needed, std::size_t capacity);
// Throws PayloadError unless the body has exactly `expected` bytes.
void check_body(const PayloadHeader& header, std::size_t body_bytes, std::size_t expected);
// Throws PayloadError unless the parameter is a power of two from 32 to 4096.
void check_block(const PayloadHeader& header);

constexpr std::size_t num_blocks(std::size_t numel, std::size_t block) { return (numel + block - 1) / block; }

// Body decoders, one per codec; they validate all that read_header did not.
using Decoder = void (*)(const PayloadHeader&, const std::uint8_t* body, std::size_t body_bytes, float* out,
                         bool accumulate);
void decode_fp16(const PayloadHeader&, const std::uint8_t*, std::size_t, float*, bool);
void decode_bf16(const PayloadHeader&, const std::uint8_t*, std::size_t, float*, bool);
void decode_int8(const PayloadHeader&, const std::uint8_t*, std::size_t, float*, bool);
void decode_int4(const PayloadHeader&, const std::uint8_t*, std::size_t, float*, bool);
void decode_onebit(const PayloadHeader&, const std::uint8_t*, std::size_t, float*, bool);
void decode_threshold(const PayloadHeader&, const std::uint8_t*, std::size_t, float*, bool);
void decode_topk(const PayloadHeader&, const std::uint8_t*, std::size_t, float*, bool);

}  // namespace paceline::codec
