// int8 and int4 with one float scale per block; round to nearest even, or stochastically (unbiased).
#include <cmath>

#include "core/codecs/block.h"
#include "core/codecs/encode.h"

#if PACELINE_X86
#include <immintrin.h>
#endif

namespace paceline::codec {
namespace {

// An integer hash of good avalanche; two rounds under two halves of the key make a counter-based generator.
PACELINE_INLINE std::uint32_t mixed(std::uint32_t z) {
  z = (z ^ (z >> 16)) * 0x7feb352du;
  z = (z ^ (z >> 15)) * 0x846ca68bu;
  return z ^ (z >> 16);
}

PACELINE_INLINE std::uint32_t random_bits(std::uint32_t key_low, std::uint32_t key_high,
                                          std::uint32_t counter) {
  return mixed(mixed(counter + key_low) ^ key_high);
}

PACELINE_INLINE std::int8_t nearest(float scaled) {
  // 1.5 · 2^23 pushes the fraction out of the mantissa: the hardware rounds to nearest even.
  return static_cast<std::int8_t>(bits_of(scaled + 0x1.8p23f) - 0x4b400000u);
}

// codes = floor(source · inverse + u), u uniform in (0, 1): the 16-bit halves of one hash serve elements l
// and l + 16 of a group of 32. `padded` is a multiple of 32, `start` the index of the first element.
using Rounder = void (*)(const float* source, std::size_t padded, float inverse, int limit, std::uint64_t key,
                         std::size_t start, std::int8_t* codes);

PACELINE_INLINE std::int8_t rounded_down(float shifted, int limit) {
  const auto truncated = static_cast<std::int32_t>(shifted);
  const std::int32_t floored = truncated - (shifted < static_cast<float>(truncated) ? 1 : 0);
  return static_cast<std::int8_t>(floored > limit ? limit : floored < -limit ? -limit : floored);
}

PACELINE_INLINE void round_body(const float* source, std::size_t padded, float inverse, int limit,
                                std::uint64_t key, std::size_t start, std::int8_t* codes) {
  const auto key_low = static_cast<std::uint32_t>(key), key_high = static_cast<std::uint32_t>(key >> 32);
  for (std::size_t group = 0; group < padded; group += 32) {
    const auto counter = static_cast<std::uint32_t>((start + group) / 2);
    for (std::uint32_t l = 0; l < 16; ++l) {
      const std::uint32_t bits = random_bits(key_low, key_high, counter + l);
      const float low = static_cast<float>(static_cast<std::int32_t>(bits & 0xffffu)) * 0x1p-16f + 0x1p-17f;
      const float high = static_cast<float>(static_cast<std::int32_t>(bits >> 16)) * 0x1p-16f + 0x1p-17f;
      codes[group + l] = rounded_down(source[group + l] * inverse + low, limit);
      codes[group + 16 + l] = rounded_down(source[group + 16 + l] * inverse + high, limit);
    }
  }
}

#if PACELINE_X86
PACELINE_AVX512 inline __m512i mixed_avx512(__m512i z) {
  z = _mm512_mullo_epi32(_mm512_xor_si512(z, _mm512_srli_epi32(z, 16)), _mm512_set1_epi32(0x7feb352d));
  z = _mm512_mullo_epi32(_mm512_xor_si512(z, _mm512_srli_epi32(z, 15)),
                         _mm512_set1_epi32(static_cast<int>(0x846ca68bu)));
  return _mm512_xor_si512(z, _mm512_srli_epi32(z, 16));
}

PACELINE_AVX512 inline __m128i rounded_down_avx512(const float* source, __m512 inverse, __m512i bits,
                                                   __m512i limit) {
  // Exact, so that one rounding (of the sum) is all there is, as in the plain version.
  const __m512 u =
      _mm512_fmadd_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(0x1p-16f), _mm512_set1_ps(0x1p-17f));
  const __m512 shifted = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(source), inverse), u);
  const __m512i code = _mm512_cvt_roundps_epi32(shifted, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512i least = _mm512_sub_epi32(_mm512_setzero_si512(), limit);
  return _mm512_cvtepi32_epi8(_mm512_max_epi32(_mm512_min_epi32(code, limit), least));
}

PACELINE_AVX512 void round_avx512(const float* source, std::size_t padded, float inverse, int limit,
                                  std::uint64_t key, std::size_t start, std::int8_t* codes) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i key_high = _mm512_set1_epi32(static_cast<int>(key >> 32));
  const __m512i limits = _mm512_set1_epi32(limit);
  __m512i counter =
      _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(static_cast<std::uint32_t>(key) +
                                                                 static_cast<std::uint32_t>(start / 2))));
  const __m512 factor = _mm512_set1_ps(inverse);
  for (std::size_t group = 0; group < padded; group += 32) {
    const __m512i bits = mixed_avx512(_mm512_xor_si512(mixed_avx512(counter), key_high));
    const __m512i low = _mm512_and_si512(bits, _mm512_set1_epi32(0xffff)), high = _mm512_srli_epi32(bits, 16);
    auto* target = reinterpret_cast<__m128i*>(codes + group);
    _mm_storeu_si128(target, rounded_down_avx512(source + group, factor, low, limits));
    _mm_storeu_si128(target + 1, rounded_down_avx512(source + group + 16, factor, high, limits));
    counter = _mm512_add_epi32(counter, _mm512_set1_epi32(16));
  }
}
#endif

Rounder rounder() {
#if PACELINE_X86
  if (isa() == Isa::avx512) return round_avx512;
  if (isa() == Isa::avx2) {
    return run_avx2<round_body, const float*, std::size_t, float, int, std::uint64_t, std::size_t,
                    std::int8_t*>;
  }
#endif
  return round_body;
}

// Byte i of an int4 group of 32 holds elements i and i + 16, offset by 8.
template <int Bits>
PACELINE_INLINE void pack(const std::int8_t* codes, std::size_t length, std::uint8_t* target) {
  if (Bits == 8) {
    std::memcpy(target, codes, length);
    return;
  }
  for (std::size_t group = 0; group < rounded_up(length, 32) / 32; ++group) {
    for (std::size_t i = 0; i < 16; ++i) {
      const auto low = static_cast<std::uint8_t>(codes[32 * group + i] + 8);
      const auto high = static_cast<std::uint8_t>(codes[32 * group + 16 + i] + 8);
      target[16 * group + i] = static_cast<std::uint8_t>(low | (high << 4));
    }
  }
}

template <int Bits>
constexpr std::size_t code_bytes(std::size_t length) {
  return Bits == 8 ? length : (length + 31) / 32 * 16;
}

// `round` is null for rounding to nearest.
template <int Bits, bool HasResidual>
PACELINE_INLINE void encode_body(const float* x, float* residual, std::size_t numel, std::size_t block,
                                 Rounder round, std::uint64_t key, F32* scales, std::uint8_t* bytes) {
  constexpr int limit = Bits == 8 ? 127 : 7;
  float values[max_block];
  std::int8_t codes[max_block];
  for (std::size_t start = 0; start < numel; start += block) {
    const std::size_t length = smaller(block, numel - start);
    const std::size_t padded = rounded_up(length, 32);
    float* remainder = HasResidual ? residual + start : nullptr;
    std::uint32_t largest;
    const float* source = load_block<HasResidual>(x + start, remainder, length, padded, values, largest);
    const bool is_finite = largest < 0x7f800000u;
    const float scale = is_finite ? float_of(largest) / static_cast<float>(limit) : float_of(0x7fc00000u);
    // Below the smallest normal float the quotient would overflow: such a block is sent as zeros.
    const bool is_zero = !is_finite || bits_of(scale) < 0x00800000u;
    const float inverse = is_zero ? 0.0f : 1.0f / scale;
    scales[start / block] = is_finite && is_zero ? 0.0f : scale;
    if (is_zero) {
      for (std::size_t i = 0; i < padded; ++i) codes[i] = 0;
    } else if (round != nullptr) {
      round(source, padded, inverse, limit, key, start, codes);
    } else {
      for (std::size_t i = 0; i < padded; ++i) codes[i] = nearest(source[i] * inverse);
    }
    pack<Bits>(codes, length, bytes + start / 32 * code_bytes<Bits>(32));
    if (HasResidual) {
      const float sent_scale = scales[start / block];
      for (std::size_t i = 0; i < length; ++i) {
        remainder[i] = remainder_of(source[i], static_cast<float>(codes[i]) * sent_scale, remainder[i]);
      }
    }
  }
}

template <bool Accumulate>
PACELINE_INLINE void int8_decode_body(const F32* scales, const std::uint8_t* bytes, std::size_t numel,
                                      std::size_t block, float* out) {
  for (std::size_t start = 0; start < numel; start += block) {
    const std::size_t length = smaller(block, numel - start);
    const float scale = scales[start / block];
    const auto* codes = reinterpret_cast<const std::int8_t*>(bytes + start);
    float* target = out + start;
    for (std::size_t i = 0; i < length; ++i) {
      const float value = static_cast<float>(codes[i]) * scale;
      target[i] = Accumulate ? target[i] + value : value;
    }
  }
}

template <bool Accumulate>
PACELINE_INLINE void int4_decode_body(const F32* scales, const std::uint8_t* bytes, std::size_t numel,
                                      std::size_t block, float* out) {
  for (std::size_t start = 0; start < numel; start += 32) {
    const float scale = scales[start / block];
    const std::uint8_t* codes = bytes + start / 2;
    float values[32];
    for (std::size_t i = 0; i < 16; ++i) {
      values[i] = static_cast<float>(static_cast<std::int32_t>(codes[i] & 15u) - 8) * scale;
      values[16 + i] = static_cast<float>(static_cast<std::int32_t>(codes[i] >> 4) - 8) * scale;
    }
    float* target = out + start;
    const std::size_t length = smaller(32, numel - start);
    for (std::size_t i = 0; i < length; ++i) target[i] = Accumulate ? target[i] + values[i] : values[i];
  }
}

template <int Bits>
std::size_t encode(CodecId id, const EncoderInput& in, std::size_t block, Rounding rounding,
                   EncoderOutput out) {
  const std::size_t blocks = num_blocks(in.numel, block);
  const std::size_t body_bytes = 4 * blocks + code_bytes<Bits>(in.numel);
  check_encoder(id, in.numel, header_bytes + body_bytes, out.capacity);
  auto* scales = reinterpret_cast<F32*>(out.bytes + header_bytes);
  std::uint8_t* codes = out.bytes + header_bytes + 4 * blocks;
  run<encode_body<Bits, true>, encode_body<Bits, false>>(in.residual != nullptr, in.x, in.residual, in.numel,
                                                         block, rounding.is_stochastic ? rounder() : nullptr,
                                                         rounding.key, scales, codes);
  return finish_payload(header_for(id, in, block), out.bytes, body_bytes);
}

}  // namespace

std::size_t max_int8(std::size_t numel, std::size_t block) {
  return header_bytes + 4 * num_blocks(numel, block) + code_bytes<8>(numel);
}

std::size_t max_int4(std::size_t numel, std::size_t block) {
  return header_bytes + 4 * num_blocks(numel, block) + code_bytes<4>(numel);
}

std::size_t encode_int8(const EncoderInput& in, std::size_t block, Rounding rounding, EncoderOutput out) {
  return encode<8>(CodecId::int8, in, block, rounding, out);
}

std::size_t encode_int4(const EncoderInput& in, std::size_t block, Rounding rounding, EncoderOutput out) {
  return encode<4>(CodecId::int4, in, block, rounding, out);
}

void decode_int8(const PayloadHeader& header, const std::uint8_t* body, std::size_t body_bytes, float* out,
                 bool accumulate) {
  check_block(header);
  const std::size_t numel = header.numel;
  const std::size_t blocks = num_blocks(numel, header.parameter);
  check_body(header, body_bytes, 4 * blocks + code_bytes<8>(numel));
  run<int8_decode_body<true>, int8_decode_body<false>>(accumulate, reinterpret_cast<const F32*>(body),
                                                       body + 4 * blocks, numel,
                                                       static_cast<std::size_t>(header.parameter), out);
}

void decode_int4(const PayloadHeader& header, const std::uint8_t* body, std::size_t body_bytes, float* out,
                 bool accumulate) {
  check_block(header);
  const std::size_t numel = header.numel;
  const std::size_t blocks = num_blocks(numel, header.parameter);
  check_body(header, body_bytes, 4 * blocks + code_bytes<4>(numel));
  run<int4_decode_body<true>, int4_decode_body<false>>(accumulate, reinterpret_cast<const F32*>(body),
                                                       body + 4 * blocks, numel,
                                                       static_cast<std::size_t>(header.parameter), out);
}

}  // namespace paceline::codec
