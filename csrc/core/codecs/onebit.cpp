// One sign bit per element and one scale (the mean magnitude, as bfloat16) per block. Seide et al. 2014.
#include "core/codecs/block.h"
#include "core/codecs/encode.h"

#if PACELINE_X86
#include <immintrin.h>
#endif

namespace paceline::codec {
namespace {

PACELINE_INLINE std::uint16_t bfloat_of(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// The lanes in halves. The order of the sum is part of the format, so that every implementation rounds alike.
PACELINE_INLINE float sum_of_lanes(float* lanes) {
  for (std::size_t width = 8; width > 0; width /= 2) {
    for (std::size_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// Sum of |values| in 16 lanes, and the sign bits; `values` is zero-padded to a multiple of 16.
using Scanner = float (*)(const float* values, std::size_t padded, std::uint8_t* signs);

float scan_baseline(const float* values, std::size_t padded, std::uint8_t* signs) {
  float lanes[16] = {};
  for (std::size_t i = 0; i < padded; i += 16) {
    std::uint32_t word = 0;
    for (std::size_t j = 0; j < 16; ++j) {
      lanes[j] += float_of(bits_of(values[i + j]) & 0x7fffffffu);
      word |= (bits_of(values[i + j]) >> 31) << j;
    }
    *reinterpret_cast<U16*>(signs + i / 8) = static_cast<std::uint16_t>(word);
  }
  return sum_of_lanes(lanes);
}

#if PACELINE_X86
PACELINE_AVX2 float scan_avx2(const float* values, std::size_t padded, std::uint8_t* signs) {
  const __m256 sign_bit = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0x80000000u)));
  __m256 low = _mm256_setzero_ps(), high = _mm256_setzero_ps();
  for (std::size_t i = 0; i < padded; i += 16) {
    const __m256 a = _mm256_loadu_ps(values + i), b = _mm256_loadu_ps(values + i + 8);
    low = _mm256_add_ps(low, _mm256_andnot_ps(sign_bit, a));
    high = _mm256_add_ps(high, _mm256_andnot_ps(sign_bit, b));
    signs[i / 8] = static_cast<std::uint8_t>(_mm256_movemask_ps(a));
    signs[i / 8 + 1] = static_cast<std::uint8_t>(_mm256_movemask_ps(b));
  }
  float lanes[16];
  _mm256_storeu_ps(lanes, low);
  _mm256_storeu_ps(lanes + 8, high);
  return sum_of_lanes(lanes);
}

PACELINE_AVX512 float scan_avx512(const float* values, std::size_t padded, std::uint8_t* signs) {
  __m512 sum = _mm512_setzero_ps();
  for (std::size_t i = 0; i < padded; i += 16) {
    const __m512 value = _mm512_loadu_ps(values + i);
    sum = _mm512_add_ps(sum, _mm512_abs_ps(value));
    *reinterpret_cast<U16*>(signs + i / 8) =
        static_cast<std::uint16_t>(_mm512_movepi32_mask(_mm512_castps_si512(value)));
  }
  float lanes[16];
  _mm512_storeu_ps(lanes, sum);
  return sum_of_lanes(lanes);
}
#endif

Scanner scanner() {
#if PACELINE_X86
  if (isa() == Isa::avx512) return scan_avx512;
  if (isa() == Isa::avx2) return scan_avx2;
#endif
  return scan_baseline;
}

constexpr std::uint32_t infinity_bits = 0x7f800000u;

// Mean |value| of a block whose sum overflowed: of values divided by the longest block, a power of two.
float mean_of_large(const float* values, std::size_t length, std::size_t padded, Scanner scan) {
  constexpr float most = static_cast<float>(max_block);
  float smaller_values[max_block];
  std::uint8_t signs[max_block / 8];
  for (std::size_t i = 0; i < padded; ++i) smaller_values[i] = values[i] / most;
  return scan(smaller_values, padded, signs) / static_cast<float>(length) * most;
}

template <bool HasResidual>
PACELINE_INLINE void encode_body(const float* x, float* residual, std::size_t numel, std::size_t block,
                                 Scanner scan, U16* scales, std::uint8_t* bytes) {
  float values[max_block];
  std::uint8_t signs[max_block / 8];
  for (std::size_t start = 0; start < numel; start += block) {
    const std::size_t length = smaller(block, numel - start);
    const std::size_t padded = rounded_up(length, 16);
    float* remainder = HasResidual ? residual + start : nullptr;
    const float* source = x + start;
    if (HasResidual || padded != length) {
      std::uint32_t largest;
      source = load_block<HasResidual>(x + start, remainder, length, padded, values, largest);
    }
    const float total = scan(source, padded, signs);
    const float mean = bits_of(total) == infinity_bits ? mean_of_large(source, length, padded, scan)
                                                         : total / static_cast<float>(length);
    std::uint16_t scale_bits = bfloat_of(mean);
    // A finite mean stays finite where rounding to nearest would not.
    if (scale_bits == 0x7f80u && bits_of(mean) < infinity_bits) scale_bits = 0x7f7fu;
    scales[start / block] = scale_bits;
    std::memcpy(bytes + start / 8, signs, (length + 7) / 8);
    if (HasResidual) {
      const std::uint32_t scale = static_cast<std::uint32_t>(scale_bits) << 16;
      for (std::size_t i = 0; i < length; ++i) {
        const float sent = float_of(scale | (bits_of(values[i]) & 0x80000000u));
        remainder[i] = remainder_of(values[i], sent, remainder[i]);
      }
    }
  }
}

// ±scale for 16 elements, added to or stored in `target`.
using Expander = void (*)(const std::uint8_t* signs, std::size_t num_groups, std::uint32_t scale,
                          float* target);

template <bool Accumulate>
PACELINE_INLINE void expand_body(const std::uint8_t* signs, std::size_t num_groups, std::uint32_t scale,
                                 float* target) {
  for (std::size_t group = 0; group < num_groups; ++group, target += 16) {
    const std::uint32_t word = reinterpret_cast<const U16*>(signs)[group];
    for (std::uint32_t j = 0; j < 16; ++j) {
      const float value = float_of(scale ^ (((word >> j) & 1u) << 31));
      target[j] = Accumulate ? target[j] + value : value;
    }
  }
}

#if PACELINE_X86
template <bool Accumulate>
PACELINE_AVX512 void expand_avx512(const std::uint8_t* signs, std::size_t num_groups, std::uint32_t scale,
                                   float* target) {
  const __m512 plus = _mm512_set1_ps(float_of(scale)), minus = _mm512_set1_ps(float_of(scale ^ 0x80000000u));
  for (std::size_t group = 0; group < num_groups; ++group, target += 16) {
    const auto word = static_cast<__mmask16>(reinterpret_cast<const U16*>(signs)[group]);
    const __m512 value = _mm512_mask_blend_ps(word, plus, minus);
    _mm512_storeu_ps(target, Accumulate ? _mm512_add_ps(_mm512_loadu_ps(target), value) : value);
  }
}
#endif

template <bool Accumulate>
Expander expander() {
#if PACELINE_X86
  if (isa() == Isa::avx512) return expand_avx512<Accumulate>;
  if (isa() == Isa::avx2) {
    return run_avx2<expand_body<Accumulate>, const std::uint8_t*, std::size_t, std::uint32_t, float*>;
  }
#endif
  return expand_body<Accumulate>;
}

template <bool Accumulate>
void decode_blocks(const U16* scales, const std::uint8_t* bytes, std::size_t numel, std::size_t block,
                   float* out) {
  const Expander expand = expander<Accumulate>();
  for (std::size_t start = 0; start < numel; start += block) {
    const std::uint32_t scale = static_cast<std::uint32_t>(scales[start / block]) << 16;
    const std::size_t length = smaller(block, numel - start);
    expand(bytes + start / 8, length / 16, scale, out + start);
    for (std::size_t i = start + length / 16 * 16; i < start + length; ++i) {
      const std::uint32_t bit = (bytes[i / 8] >> (i % 8)) & 1u;
      const float value = float_of(scale ^ (bit << 31));
      out[i] = Accumulate ? out[i] + value : value;
    }
  }
}

}  // namespace

std::size_t max_onebit(std::size_t numel, std::size_t block) {
  return header_bytes + 2 * num_blocks(numel, block) + (numel + 7) / 8;
}

std::size_t encode_onebit(const EncoderInput& in, std::size_t block, EncoderOutput out) {
  check_encoder(CodecId::onebit, in.numel, max_onebit(in.numel, block), out.capacity);
  const std::size_t blocks = num_blocks(in.numel, block);
  auto* scales = reinterpret_cast<U16*>(out.bytes + header_bytes);
  std::uint8_t* signs = out.bytes + header_bytes + 2 * blocks;
  run<encode_body<true>, encode_body<false>>(in.residual != nullptr, in.x, in.residual, in.numel, block,
                                             scanner(), scales, signs);
  return finish_payload(header_for(CodecId::onebit, in, block), out.bytes, 2 * blocks + (in.numel + 7) / 8);
}

void decode_onebit(const PayloadHeader& header, const std::uint8_t* body, std::size_t body_bytes, float* out,
                   bool accumulate) {
  check_block(header);
  const std::size_t numel = header.numel;
  const std::size_t blocks = num_blocks(numel, header.parameter);
  check_body(header, body_bytes, 2 * blocks + (numel + 7) / 8);
  const auto* scales = reinterpret_cast<const U16*>(body);
  const auto decode_all = accumulate ? decode_blocks<true> : decode_blocks<false>;
  decode_all(scales, body + 2 * blocks, numel, header.parameter, out);
}

}  // namespace paceline::codec
