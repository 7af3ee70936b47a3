// Encoders. Each makes one pass over x (and over the residual, where there is one) and writes a payload.
//
// `residual` may be null. Otherwise the encoder sends x + residual and leaves in `residual` what was not
// sent: error feedback in the same pass. `out` needs the bytes that the matching max_* function names.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/codecs/payload.h"

namespace paceline::codec {

struct EncoderInput {
  const float* x;
  float* residual;
  std::size_t numel;
  SourceType source;
  bool has_checksum;
};

struct EncoderOutput {
  std::uint8_t* bytes;
  std::size_t capacity;
};

// What every encoder says of its payload; a sparse one adds what it has counted.
inline PayloadHeader header_for(CodecId id, const EncoderInput& in, std::size_t block = 0) {
  PayloadHeader header;
  header.id = id;
  header.source = in.source;
  header.has_checksum = in.has_checksum;
  header.numel = in.numel;
  header.parameter = static_cast<std::uint32_t>(block);
  return header;
}

// Stochastic rounding draws from a counter-based generator: 16 bits for each element, decided by key and
// index.
struct Rounding {
  bool is_stochastic = false;
  std::uint64_t key = 0;
};

std::size_t max_fp16(std::size_t numel, std::size_t block);
std::size_t max_bf16(std::size_t numel);
std::size_t max_int8(std::size_t numel, std::size_t block);
std::size_t max_int4(std::size_t numel, std::size_t block);
std::size_t max_onebit(std::size_t numel, std::size_t block);
std::size_t max_threshold(std::size_t numel);
std::size_t max_topk(std::size_t count);

std::size_t encode_fp16(const EncoderInput&, std::size_t block, EncoderOutput);
std::size_t encode_bf16(const EncoderInput&, EncoderOutput);
std::size_t encode_int8(const EncoderInput&, std::size_t block, Rounding, EncoderOutput);
std::size_t encode_int4(const EncoderInput&, std::size_t block, Rounding, EncoderOutput);
std::size_t encode_onebit(const EncoderInput&, std::size_t block, EncoderOutput);

// Strom 2015. The residual is required. `num_skipped` counts elements that were not finite: they are
// neither sent nor kept.
std::size_t encode_threshold(const EncoderInput&, float tau, bool entropy, EncoderOutput,
                             std::uint64_t* num_skipped);

// The `count` largest |x|, ties to the lowest index.
std::size_t encode_topk(const EncoderInput&, std::size_t count, bool entropy, EncoderOutput);

}  // namespace paceline::codec
