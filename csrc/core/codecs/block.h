// What the dense block-scaled codecs share: x + residual in cache-sized blocks, and unaligned access.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/codecs/isa.h"

namespace paceline::codec {

constexpr std::size_t max_block = 4096;  // 16 KiB of float32: half of a small L1 cache

// Bodies start at any byte of a message.
using U16 __attribute__((aligned(1), may_alias)) = std::uint16_t;
using U32 __attribute__((aligned(1), may_alias)) = std::uint32_t;
using F32 __attribute__((aligned(1), may_alias)) = float;

// x + residual for one block: x itself where there is no residual and no padding, else `values`, zero-padded
// to `padded`. `largest` becomes the bits of the largest magnitude; compared as integers NaN > infinity >
// every finite value, so nothing that is not finite goes unseen.
template <bool HasResidual>
PACELINE_INLINE const float* load_block(const float* x, const float* residual, std::size_t length,
                                        std::size_t padded, float* values, std::uint32_t& largest) {
  std::uint32_t maximum = 0;
  if (!HasResidual && length == padded) {
    for (std::size_t i = 0; i < length; ++i) {
      const std::uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
      maximum = magnitude > maximum ? magnitude : maximum;
    }
    largest = maximum;
    return x;
  }
  for (std::size_t i = 0; i < length; ++i) {
    const float value = HasResidual ? x[i] + residual[i] : x[i];
    const std::uint32_t magnitude = bits_of(value) & 0x7fffffffu;
    maximum = magnitude > maximum ? magnitude : maximum;
    values[i] = value;
  }
  for (std::size_t i = length; i < padded; ++i) values[i] = 0.0f;
  largest = maximum;
  return values;
}

PACELINE_INLINE std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }
PACELINE_INLINE std::size_t rounded_up(std::size_t n, std::size_t step) {
  return (n + step - 1) / step * step;
}

}  // namespace paceline::codec
