// fp16 with one power-of-two scale per block, and bf16.
#include "core/codecs/block.h"
#include "core/codecs/encode.h"

#if PACELINE_X86
#include <immintrin.h>
#endif

namespace paceline::codec {
namespace {

// Round to nearest even; overflow to infinity; NaN to the one quiet NaN.
PACELINE_INLINE std::uint16_t half_of(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 makes the hardware round at the last place of a subnormal half.
  const std::uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  std::uint32_t half = magnitude < 0x38800000u ? tiny : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half |= sign;
  return static_cast<std::uint16_t>(magnitude > 0x7f800000u ? 0x7e00u : half);
}

PACELINE_INLINE float float_of_half(std::uint16_t half) {
  const std::uint32_t shifted = (half & 0x7fffu) << 13;
  const std::uint32_t exponent = shifted & 0x0f800000u;
  const std::uint32_t normal = shifted + (112u << 23);
  const std::uint32_t tiny = bits_of(float_of(shifted + (113u << 23)) - float_of(113u << 23));
  std::uint32_t bits = exponent == 0 ? tiny : normal;
  bits = exponent == 0x0f800000u ? normal + (112u << 23) : bits;
  return float_of(bits | (static_cast<std::uint32_t>(half & 0x8000u) << 16));
}

PACELINE_INLINE std::uint16_t bfloat_of(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

PACELINE_INLINE float float_of_bfloat(std::uint16_t value) {
  return float_of(static_cast<std::uint32_t>(value) << 16);
}

// The power of two that brings the block's largest magnitude to [2^14, 2^15): no overflow, least underflow.
PACELINE_INLINE std::uint32_t scale_exponent(std::uint32_t largest) {
  const std::uint32_t exponent = 268u - (largest >> 23);
  if (largest == 0 || largest >= 0x7f800000u) return 127u;  // a scale of 1
  return exponent > 253u ? 253u : exponent;
}

// codes = half(values · up); where there is a residual, remainder = values - codes · down.
using HalfPacker = void (*)(const float* values, float up, float down, std::size_t length,
                            std::uint16_t* codes, float* remainder);

PACELINE_INLINE void pack_half_body(const float* values, float up, float down, std::size_t length,
                                    std::uint16_t* codes, float* remainder) {
  for (std::size_t i = 0; i < length; ++i) codes[i] = half_of(values[i] * up);
  if (remainder == nullptr) return;
  for (std::size_t i = 0; i < length; ++i) {
    remainder[i] = remainder_of(values[i], float_of_half(codes[i]) * down, remainder[i]);
  }
}

#if PACELINE_X86
PACELINE_AVX512 void pack_half_avx512(const float* values, float up, float down, std::size_t length,
                                      std::uint16_t* codes, float* remainder) {
  const __m512 infinity = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000));
  std::size_t i = 0;
  for (; i + 16 <= length; i += 16) {
    const __m512 value = _mm512_loadu_ps(values + i);
    const __m512 scaled = _mm512_mul_ps(value, _mm512_set1_ps(up));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q);
    const __m256i rounded = _mm512_cvtps_ph(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i half = _mm256_mask_mov_epi16(rounded, is_nan, _mm256_set1_epi16(0x7e00));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), half);
    if (remainder == nullptr) continue;
    const __m512 left = _mm512_sub_ps(value, _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(down)));
    const __mmask16 is_finite = _mm512_cmp_ps_mask(_mm512_abs_ps(left), infinity, _CMP_LT_OQ);
    _mm512_mask_storeu_ps(remainder + i, is_finite, left);
  }
  pack_half_body(values + i, up, down, length - i, codes + i, remainder == nullptr ? nullptr : remainder + i);
}
#endif

HalfPacker half_packer() {
#if PACELINE_X86
  if (isa() == Isa::avx512) return pack_half_avx512;
  if (isa() == Isa::avx2) {
    return run_avx2<pack_half_body, const float*, float, float, std::size_t, std::uint16_t*, float*>;
  }
#endif
  return pack_half_body;
}

template <bool HasResidual>
PACELINE_INLINE void fp16_body(const float* x, float* residual, std::size_t numel, std::size_t block,
                               HalfPacker pack_half, F32* scales, std::uint8_t* codes) {
  float values[max_block];
  std::uint16_t local[max_block];
  for (std::size_t start = 0; start < numel; start += block) {
    const std::size_t length = smaller(block, numel - start);
    float* remainder = HasResidual ? residual + start : nullptr;
    std::uint32_t largest;
    const float* source = load_block<HasResidual>(x + start, remainder, length, length, values, largest);
    const std::uint32_t exponent = scale_exponent(largest);
    const float up = float_of(exponent << 23);
    const float down = float_of((254u - exponent) << 23);
    scales[start / block] = down;
    pack_half(source, up, down, length, local, remainder);
    std::memcpy(codes + 2 * start, local, 2 * length);
  }
}

template <bool HasResidual>
PACELINE_INLINE void bf16_body(const float* x, float* residual, std::size_t numel, U16* codes) {
  for (std::size_t i = 0; i < numel; ++i) {
    const float value = HasResidual ? x[i] + residual[i] : x[i];
    const std::uint16_t code = bfloat_of(value);
    codes[i] = code;
    if (HasResidual) residual[i] = remainder_of(value, float_of_bfloat(code), residual[i]);
  }
}

template <bool Accumulate>
PACELINE_INLINE void fp16_decode_body(const F32* scales, const U16* codes, std::size_t numel,
                                      std::size_t block, float* out) {
  for (std::size_t start = 0; start < numel; start += block) {
    const std::size_t length = smaller(block, numel - start);
    const float scale = scales[start / block];
    const U16* source = codes + start;
    float* target = out + start;
    for (std::size_t i = 0; i < length; ++i) {
      const float value = float_of_half(source[i]) * scale;
      target[i] = Accumulate ? target[i] + value : value;
    }
  }
}

template <bool Accumulate>
PACELINE_INLINE void bf16_decode_body(const U16* codes, std::size_t numel, float* out) {
  for (std::size_t i = 0; i < numel; ++i) {
    const float value = float_of_bfloat(codes[i]);
    out[i] = Accumulate ? out[i] + value : value;
  }
}

}  // namespace

std::size_t max_fp16(std::size_t numel, std::size_t block) {
  return header_bytes + 4 * num_blocks(numel, block) + 2 * numel;
}

std::size_t max_bf16(std::size_t numel) { return header_bytes + 2 * numel; }

std::size_t encode_fp16(const EncoderInput& in, std::size_t block, EncoderOutput out) {
  check_encoder(CodecId::fp16, in.numel, max_fp16(in.numel, block), out.capacity);
  const std::size_t blocks = num_blocks(in.numel, block);
  auto* scales = reinterpret_cast<F32*>(out.bytes + header_bytes);
  std::uint8_t* codes = out.bytes + header_bytes + 4 * blocks;
  run<fp16_body<true>, fp16_body<false>>(in.residual != nullptr, in.x, in.residual, in.numel, block,
                                         half_packer(), scales, codes);
  return finish_payload(header_for(CodecId::fp16, in, block), out.bytes, 4 * blocks + 2 * in.numel);
}

std::size_t encode_bf16(const EncoderInput& in, EncoderOutput out) {
  check_encoder(CodecId::bf16, in.numel, max_bf16(in.numel), out.capacity);
  auto* codes = reinterpret_cast<U16*>(out.bytes + header_bytes);
  run<bf16_body<true>, bf16_body<false>>(in.residual != nullptr, in.x, in.residual, in.numel, codes);
  return finish_payload(header_for(CodecId::bf16, in), out.bytes, 2 * in.numel);
}

void decode_fp16(const PayloadHeader& header, const std::uint8_t* body, std::size_t body_bytes, float* out,
                 bool accumulate) {
  check_block(header);
  const std::size_t blocks = num_blocks(header.numel, header.parameter);
  check_body(header, body_bytes, 4 * blocks + 2 * header.numel);
  const auto* scales = reinterpret_cast<const F32*>(body);
  const auto* codes = reinterpret_cast<const U16*>(body + 4 * blocks);
  run<fp16_decode_body<true>, fp16_decode_body<false>>(accumulate, scales, codes,
                                                       static_cast<std::size_t>(header.numel),
                                                       static_cast<std::size_t>(header.parameter), out);
}

void decode_bf16(const PayloadHeader& header, const std::uint8_t* body, std::size_t body_bytes, float* out,
                 bool accumulate) {
  if (header.parameter != 0) throw PayloadError("bf16 payload: it has no parameter");
  check_body(header, body_bytes, 2 * header.numel);
  const auto* codes = reinterpret_cast<const U16*>(body);
  run<bf16_decode_body<true>, bf16_decode_body<false>>(accumulate, codes,
                                                       static_cast<std::size_t>(header.numel), out);
}

}  // namespace paceline::codec
