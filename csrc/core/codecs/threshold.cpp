// ±τ updates with a residual, in one pass: r += x; where |r| >= τ send (index, sign) and take ±τ off r.
// Source: Strom, Interspeech 2015. Words (31-bit index + sign), their Rice code, or 2 bits per element.
#include <cmath>
#include <memory>

#include "core/codecs/block.h"
#include "core/codecs/encode.h"
#include "core/codecs/rice.h"

#if PACELINE_X86
#include <immintrin.h>
#endif

namespace paceline::codec {
namespace {

constexpr std::uint32_t sign_bit_mask = 0x80000000u;
constexpr std::size_t slack = 16;  // words that one vector store may write beyond the last hit

struct Pass {
  const float* x;
  float* residual;
  std::size_t numel;
  float tau;
  U32* words;  // room for max_words + slack
  std::size_t max_words;
  std::size_t count = 0;
  std::uint64_t skipped = 0;
};

// One group of up to 16 elements; sets the masks of positive and negative hits.
PACELINE_INLINE void step_group(Pass& pass, std::size_t start, std::uint32_t& positive,
                                std::uint32_t& negative) {
  const std::size_t length = smaller(16, pass.numel - start);
  positive = negative = 0;
  for (std::size_t j = 0; j < length; ++j) {
    const std::size_t i = start + j;
    const float value = pass.residual[i] + pass.x[i];
    const float magnitude = float_of(bits_of(value) & ~sign_bit_mask);
    if (bits_of(magnitude) >= 0x7f800000u) {
      ++pass.skipped;
      continue;
    }
    if (magnitude < pass.tau) {
      pass.residual[i] = value;
      continue;
    }
    const std::uint32_t sign = bits_of(value) & sign_bit_mask;
    pass.residual[i] = value - float_of(sign | bits_of(pass.tau));
    (sign ? negative : positive) |= 1u << j;
  }
}

PACELINE_INLINE void emit(Pass& pass, std::size_t start, std::uint32_t positive, std::uint32_t negative) {
  for (std::uint32_t hits = positive | negative; hits != 0; hits &= hits - 1) {
    const auto j = static_cast<std::uint32_t>(__builtin_ctz(hits));
    const std::uint32_t sign = (negative >> j) & 1u ? sign_bit_mask : 0u;
    pass.words[pass.count++] = static_cast<std::uint32_t>(start + j) | sign;
  }
}

// Both return where they stopped: at numel, or at the first group that found max_words exceeded.
std::size_t words_scalar(Pass& pass, std::size_t start) {
  for (; start < pass.numel && pass.count <= pass.max_words; start += 16) {
    std::uint32_t positive, negative;
    step_group(pass, start, positive, negative);
    emit(pass, start, positive, negative);
  }
  return smaller(start, pass.numel);
}

#if PACELINE_X86
PACELINE_AVX512 std::size_t words_avx512(Pass& pass) {
  const __m512 tau = _mm512_set1_ps(pass.tau);
  const __m512 infinity = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f800000));
  const __m512i sign_bit = _mm512_set1_epi32(static_cast<int>(sign_bit_mask));
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  std::size_t start = 0;
  for (; start + 16 <= pass.numel && pass.count <= pass.max_words; start += 16) {
    float* residual = pass.residual + start;
    const __m512 value = _mm512_add_ps(_mm512_loadu_ps(residual), _mm512_loadu_ps(pass.x + start));
    const __m512 magnitude = _mm512_abs_ps(value);
    const __mmask16 finite = _mm512_cmp_ps_mask(magnitude, infinity, _CMP_LT_OQ);
    const __mmask16 hits = _mm512_mask_cmp_ps_mask(finite, magnitude, tau, _CMP_GE_OQ);
    if (__builtin_expect(hits == 0 && finite == 0xffff, 1)) {
      _mm512_storeu_ps(residual, value);
      continue;
    }
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(value), sign_bit);
    const __m512 sent = _mm512_castsi512_ps(_mm512_or_si512(sign, _mm512_castps_si512(tau)));
    _mm512_mask_storeu_ps(residual, finite, _mm512_mask_sub_ps(value, hits, value, sent));
    const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(start)), lanes);
    // Compress in the register and store whole: a compressing store is slow on several CPUs.
    const __m512i packed = _mm512_maskz_compress_epi32(hits, _mm512_or_si512(index, sign));
    _mm512_storeu_si512(static_cast<void*>(pass.words + pass.count), packed);
    pass.count += static_cast<std::size_t>(__builtin_popcount(hits));
    pass.skipped += static_cast<std::uint64_t>(16 - __builtin_popcount(finite));
  }
  return start;
}

PACELINE_AVX2 std::size_t words_avx2(Pass& pass) {
  const __m256 tau = _mm256_set1_ps(pass.tau);
  const __m256 infinity = _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000));
  const __m256 sign_bit = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(sign_bit_mask)));
  std::size_t start = 0;
  for (; start + 16 <= pass.numel && pass.count <= pass.max_words; start += 16) {
    std::uint32_t positive = 0, negative = 0;
    for (std::size_t half = 0; half < 16; half += 8) {
      float* residual = pass.residual + start + half;
      const __m256 old = _mm256_loadu_ps(residual);
      const __m256 value = _mm256_add_ps(old, _mm256_loadu_ps(pass.x + start + half));
      const __m256 magnitude = _mm256_andnot_ps(sign_bit, value);
      const __m256 finite = _mm256_cmp_ps(magnitude, infinity, _CMP_LT_OQ);
      const __m256 hits = _mm256_and_ps(_mm256_cmp_ps(magnitude, tau, _CMP_GE_OQ), finite);
      const __m256 sent = _mm256_and_ps(hits, _mm256_or_ps(_mm256_and_ps(value, sign_bit), tau));
      _mm256_storeu_ps(residual, _mm256_blendv_ps(old, _mm256_sub_ps(value, sent), finite));
      const auto hit_mask = static_cast<std::uint32_t>(_mm256_movemask_ps(hits));
      const auto sign_mask = static_cast<std::uint32_t>(_mm256_movemask_ps(value));
      positive |= (hit_mask & ~sign_mask) << half;
      negative |= (hit_mask & sign_mask) << half;
      const auto finite_mask = static_cast<std::uint32_t>(_mm256_movemask_ps(finite));
      pass.skipped += static_cast<std::uint64_t>(8 - __builtin_popcount(finite_mask));
    }
    emit(pass, start, positive, negative);
  }
  return start;
}
#endif

std::size_t words_best(Pass& pass) {
  std::size_t start = 0;
#if PACELINE_X86
  if (isa() == Isa::avx512) start = words_avx512(pass);
  if (isa() == Isa::avx2) start = words_avx2(pass);
#endif
  return words_scalar(pass, start);
}

// A bitmap is two 16-bit masks per group of 16 elements: positive hits, negative hits.
std::size_t bitmap_bytes(std::size_t numel) { return 4 * num_blocks(numel, 16); }

// Too many hits for words: turns those found so far into bits, then continues from `start` in bits.
void continue_as_bitmap(Pass& pass, std::size_t start) {
  const auto found = std::make_unique<std::uint32_t[]>(pass.count);
  std::memcpy(found.get(), pass.words, 4 * pass.count);
  U32* groups = pass.words;
  std::memset(reinterpret_cast<std::uint8_t*>(groups), 0, 4 * num_blocks(start, 16));
  for (std::size_t i = 0; i < pass.count; ++i) {
    const std::uint32_t index = found[i] & index_mask;
    groups[index / 16] |= 1u << (index % 16 + (found[i] & sign_bit_mask ? 16 : 0));
  }
  for (; start < pass.numel; start += 16) {
    std::uint32_t positive, negative;
    step_group(pass, start, positive, negative);
    groups[start / 16] = positive | (negative << 16);
    pass.count += static_cast<std::size_t>(__builtin_popcount(positive | negative));
  }
}

void decode_words(const PayloadHeader& header, const U32* words, float* out, bool accumulate) {
  std::int64_t last = -1;
  for (std::uint32_t i = 0; i < header.count; ++i) {
    const std::int64_t index = words[i] & index_mask;
    if (index <= last) throw PayloadError("threshold payload: indexes are not increasing");
    last = index;
  }
  if (last >= static_cast<std::int64_t>(header.numel)) {
    throw PayloadError("threshold payload: an index beyond the tensor's end");
  }
  if (!accumulate) std::memset(out, 0, 4 * header.numel);
  const std::uint32_t tau = bits_of(header.scale);
  for (std::uint32_t i = 0; i < header.count; ++i) {
    const std::uint32_t word = words[i];
    out[word & index_mask] += float_of((word & sign_bit_mask) | tau);
  }
}

void decode_rice(const PayloadHeader& header, const std::uint8_t* body, std::size_t body_bytes, float* out,
                 bool accumulate) {
  if (header.parameter > max_rice_parameter) throw PayloadError("threshold payload: Rice parameter above 30");
  RiceReader check(header, body, body_bytes, true);
  for (std::uint32_t i = 0; i < header.count; ++i) check.next();
  check.expect_end();
  if (!accumulate) std::memset(out, 0, 4 * header.numel);
  const std::uint32_t tau = bits_of(header.scale);
  RiceReader reader(header, body, body_bytes, true);
  for (std::uint32_t i = 0; i < header.count; ++i) {
    const std::uint32_t word = reader.next();
    out[word & index_mask] += float_of((word & sign_bit_mask) | tau);
  }
}

template <bool Accumulate>
PACELINE_INLINE void bitmap_body(const U32* groups, std::size_t numel, std::uint32_t tau, float* out) {
  std::size_t start = 0;
  for (; start + 16 <= numel; start += 16) {
    const std::uint32_t group = groups[start / 16];
    float* target = out + start;
    for (std::uint32_t j = 0; j < 16; ++j) {
      const auto positive = static_cast<std::int32_t>((group >> j) & 1u);
      const auto negative = static_cast<std::int32_t>((group >> (16 + j)) & 1u);
      const float value = static_cast<float>(positive - negative) * float_of(tau);
      target[j] = Accumulate ? target[j] + value : value;
    }
  }
  for (; start < numel; ++start) {
    const std::uint32_t group = groups[start / 16] >> (start % 16);
    const float value = float_of((0u - ((group | (group >> 16)) & 1u)) & (tau | ((group >> 16) << 31)));
    out[start] = Accumulate ? out[start] + value : value;
  }
}

void decode_bitmap(const PayloadHeader& header, const U32* groups, float* out, bool accumulate) {
  const std::size_t num_groups = num_blocks(header.numel, 16);
  std::uint64_t hits = 0;
  std::uint32_t both = 0;
  for (std::size_t i = 0; i < num_groups; ++i) {
    const std::uint32_t group = groups[i];
    both |= group & (group >> 16) & 0xffffu;
    hits += static_cast<std::uint64_t>(__builtin_popcount(group));
  }
  if (both != 0) throw PayloadError("threshold payload: an element is hit in both directions");
  if (hits != header.count)
    throw PayloadError("threshold payload: the bitmap does not have the hits it claims");
  const std::uint32_t filled = static_cast<std::uint32_t>(header.numel % 16);
  if (filled != 0 && (groups[num_groups - 1] & ~(((1u << filled) - 1u) * 0x10001u)) != 0) {
    throw PayloadError("threshold payload: a hit beyond the tensor's end");
  }
  run<bitmap_body<true>, bitmap_body<false>>(accumulate, groups, static_cast<std::size_t>(header.numel),
                                             bits_of(header.scale), out);
}

}  // namespace

std::size_t max_threshold(std::size_t numel) {
  const std::size_t words = 4 * (numel / 16 + 1 + slack + 16);
  return header_bytes + (words > bitmap_bytes(numel) ? words : bitmap_bytes(numel));
}

std::size_t encode_threshold(const EncoderInput& in, float tau, bool entropy, EncoderOutput out,
                             std::uint64_t* num_skipped) {
  check_encoder(CodecId::threshold, in.numel, max_threshold(in.numel), out.capacity);
  if (!(tau > 0.0f) || !std::isfinite(tau)) throw ArgumentError("threshold: tau must be positive and finite");
  if (in.residual == nullptr && in.numel > 0) throw ArgumentError("threshold: a residual is required");
  std::uint8_t* body = out.bytes + header_bytes;
  Pass pass{in.x, in.residual, in.numel, tau, reinterpret_cast<U32*>(body), in.numel / 16};
  const std::size_t stop = words_best(pass);
  PayloadHeader header = header_for(CodecId::threshold, in);
  header.scale = tau;
  std::size_t body_bytes = 4 * pass.count;
  if (pass.count > pass.max_words) {
    continue_as_bitmap(pass, stop);
    header.layout = BodyLayout::bitmap;
    body_bytes = bitmap_bytes(in.numel);
  } else if (entropy) {
    const auto words = std::make_unique<std::uint32_t[]>(pass.count);
    std::memcpy(words.get(), body, body_bytes);
    const RicePlan plan = plan_rice(words.get(), pass.count, true);
    if (plan.bytes < body_bytes) {
      write_rice(words.get(), pass.count, true, plan, body);
      header.layout = BodyLayout::rice;
      header.parameter = plan.parameter;
      body_bytes = plan.bytes;
    }
  }
  header.count = static_cast<std::uint32_t>(pass.count);
  *num_skipped = pass.skipped;
  return finish_payload(header, out.bytes, body_bytes);
}

void decode_threshold(const PayloadHeader& header, const std::uint8_t* body, std::size_t body_bytes,
                      float* out, bool accumulate) {
  if (!(header.scale > 0.0f) || !std::isfinite(header.scale)) {
    throw PayloadError("threshold payload: tau is not positive and finite");
  }
  if (header.layout != BodyLayout::rice && header.parameter != 0) {
    throw PayloadError("threshold payload: only its entropy-coded form has a parameter");
  }
  const auto* words = reinterpret_cast<const U32*>(body);
  if (header.layout == BodyLayout::words) {
    check_body(header, body_bytes, 4 * static_cast<std::size_t>(header.count));
    decode_words(header, words, out, accumulate);
  } else if (header.layout == BodyLayout::bitmap) {
    check_body(header, body_bytes, bitmap_bytes(header.numel));
    decode_bitmap(header, words, out, accumulate);
  } else {
    decode_rice(header, body, body_bytes, out, accumulate);
  }
}

}  // namespace paceline::codec
