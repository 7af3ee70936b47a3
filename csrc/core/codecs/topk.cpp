// The `count` largest magnitudes with their exact values. One pass adds the residual and counts magnitudes
// in 2048 bins; a second gathers what lies in or above the bin that the count-th largest falls into.
#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "core/codecs/block.h"
#include "core/codecs/encode.h"
#include "core/codecs/rice.h"

namespace paceline::codec {
namespace {

constexpr std::size_t num_bins = 2048;  // sign-free exponent and 3 bits of the mantissa
constexpr std::size_t first_infinite = 0x7f8u;
using Bins = std::array<std::array<std::uint32_t, num_bins>, 4>;  // four, so that equal values do not collide

std::uint32_t magnitude_of(float value) { return bits_of(value) & 0x7fffffffu; }

std::array<std::size_t, num_bins> count_bins(const EncoderInput& in) {
  const auto bins = std::make_unique<Bins>();
  for (auto& one : *bins) one.fill(0);
  for (std::size_t i = 0; i < in.numel; ++i) {
    float value = in.x[i];
    if (in.residual != nullptr) in.residual[i] = value = value + in.residual[i];
    ++(*bins)[i % 4][magnitude_of(value) >> 20];
  }
  std::array<std::size_t, num_bins> total{};
  for (const auto& one : *bins) {
    for (std::size_t b = 0; b < num_bins; ++b) total[b] += one[b];
  }
  return total;
}

// Indexes of the `count` largest magnitudes, increasing; ties go to the lowest index.
std::vector<std::uint32_t> select(const float* values, std::size_t numel, std::size_t count,
                                  const std::array<std::size_t, num_bins>& bins) {
  std::size_t above = 0;
  std::size_t bin = num_bins;
  while (bin > 0 && above + bins[bin - 1] < count) above += bins[--bin];
  std::vector<std::uint32_t> chosen, boundary;
  if (count == 0 || bin == 0) return chosen;
  --bin;  // the bin that holds the count-th largest
  chosen.reserve(count);
  boundary.reserve(bins[bin]);
  const auto lowest = static_cast<std::uint32_t>(bin) << 20;
  for (std::size_t i = 0; i < numel; ++i) {
    const std::uint32_t magnitude = magnitude_of(values[i]);
    if (magnitude < lowest) continue;
    (magnitude >> 20 == bin ? boundary : chosen).push_back(static_cast<std::uint32_t>(i));
  }
  const auto needed = static_cast<std::ptrdiff_t>(count - above);
  const auto is_larger = [values](std::uint32_t a, std::uint32_t b) {
    const std::uint32_t left = magnitude_of(values[a]), right = magnitude_of(values[b]);
    return left != right ? left > right : a < b;
  };
  std::nth_element(boundary.begin(), boundary.begin() + needed - 1, boundary.end(), is_larger);
  chosen.insert(chosen.end(), boundary.begin(), boundary.begin() + needed);
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

void drop_what_is_not_finite(float* residual, std::size_t numel) {
  for (std::size_t i = 0; i < numel; ++i) {
    if (magnitude_of(residual[i]) >= 0x7f800000u) residual[i] = 0.0f;
  }
}

}  // namespace

std::size_t max_topk(std::size_t count) { return header_bytes + 8 * count; }

std::size_t encode_topk(const EncoderInput& in, std::size_t count, bool entropy, EncoderOutput out) {
  check_encoder(CodecId::topk, in.numel, max_topk(count), out.capacity);
  if (count > in.numel) throw ArgumentError("topk: more elements wanted than the tensor has");
  const auto bins = count_bins(in);
  const float* values = in.residual != nullptr ? in.residual : in.x;
  const std::vector<std::uint32_t> chosen = select(values, in.numel, count, bins);
  std::uint8_t* body = out.bytes + header_bytes;
  auto* sent = reinterpret_cast<F32*>(body);
  for (std::size_t i = 0; i < count; ++i) sent[i] = values[chosen[i]];
  if (in.residual != nullptr) {
    for (const std::uint32_t index : chosen) in.residual[index] = 0.0f;
    if (std::any_of(bins.begin() + first_infinite, bins.end(), [](std::size_t n) { return n != 0; })) {
      drop_what_is_not_finite(in.residual, in.numel);
    }
  }
  PayloadHeader header = header_for(CodecId::topk, in);
  header.count = static_cast<std::uint32_t>(count);
  std::size_t index_bytes = 4 * count;
  const RicePlan plan = entropy ? plan_rice(chosen.data(), count, false) : RicePlan{0, index_bytes};
  if (plan.bytes < index_bytes) {
    write_rice(chosen.data(), count, false, plan, body + 4 * count);
    header.layout = BodyLayout::rice;
    header.parameter = plan.parameter;
    index_bytes = plan.bytes;
  } else if (count > 0) {
    std::memcpy(body + 4 * count, chosen.data(), index_bytes);
  }
  return finish_payload(header, out.bytes, 4 * count + index_bytes);
}

void decode_topk(const PayloadHeader& header, const std::uint8_t* body, std::size_t body_bytes, float* out,
                 bool accumulate) {
  const std::size_t count = header.count;
  if (bits_of(header.scale) != 0) throw PayloadError("topk payload: it has no tau");
  const auto* values = reinterpret_cast<const F32*>(body);
  if (header.layout == BodyLayout::words) {
    if (header.parameter != 0)
      throw PayloadError("topk payload: only its entropy-coded form has a parameter");
    check_body(header, body_bytes, 8 * count);
    const auto* indexes = reinterpret_cast<const U32*>(body + 4 * count);
    std::int64_t last = -1;
    for (std::size_t i = 0; i < count; ++i) {
      const std::int64_t index = indexes[i];
      if (index <= last) throw PayloadError("topk payload: indexes are not increasing");
      last = index;
    }
    if (last >= static_cast<std::int64_t>(header.numel)) {
      throw PayloadError("topk payload: an index beyond the tensor's end");
    }
    if (!accumulate) std::memset(out, 0, 4 * header.numel);
    for (std::size_t i = 0; i < count; ++i) out[indexes[i]] += values[i];
    return;
  }
  if (header.layout != BodyLayout::rice || header.parameter > max_rice_parameter || body_bytes < 4 * count) {
    throw PayloadError("topk payload: its layout is unknown, or it ends before its values do");
  }
  RiceReader check(header, body + 4 * count, body_bytes - 4 * count, false);
  for (std::size_t i = 0; i < count; ++i) check.next();
  check.expect_end();
  if (!accumulate) std::memset(out, 0, 4 * header.numel);
  RiceReader reader(header, body + 4 * count, body_bytes - 4 * count, false);
  for (std::size_t i = 0; i < count; ++i) out[reader.next()] += values[i];
}

}  // namespace paceline::codec
