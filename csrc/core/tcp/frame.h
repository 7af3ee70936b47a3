// The format of an authenticated link: fixed headers, each followed by at most one slice of a message.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/base/crc32c.h"

namespace paceline {

inline constexpr std::size_t slice_bytes = 256 << 10;
// What one peer may send unasked before it is matched; bounds the memory of stashes.
inline constexpr std::uint64_t credit_bytes = 8 << 20;

enum class FrameKind : std::uint8_t {
  data = 1,  // a slice of message `sequence`; the first one announces the message as well
  announce,  // message `sequence` is ready but too large to send unasked
  accept,    // send message `sequence`
  credit,    // carries only `consumed_bytes`
  goodbye,   // no more messages follow: the end of the stream is meant
  ask,       // question `sequence`: which rank do you wait for in group `tag`?
  answer,    // to question `sequence` of group `tag`: a rank + 2, or a special value of Respondent + 2
};

struct LinkFrameHeader {
  std::uint32_t num_bytes = 0;  // of the slice that follows
  FrameKind kind = FrameKind::data;
  std::uint8_t is_checked = 0;  // whether `checksum` counts
  std::uint16_t reserved = 0;
  std::uint64_t sequence = 0;  // counts the messages from this sender to this receiver
  std::uint64_t tag = 0;
  std::uint64_t total_bytes = 0;  // of the message; in an answer: the answer
  std::uint64_t offset = 0;
  std::uint64_t consumed_bytes = 0;  // of unasked messages of the receiver's, so far: returns credit to it
  std::uint32_t checksum = 0;        // CRC-32C of this header with checksum 0, continued over the slice
  std::uint32_t padding = 0;
};
static_assert(sizeof(LinkFrameHeader) == 56 && std::endian::native == std::endian::little);

// Why these bytes are not a valid header, or nullptr.
inline const char* defect_of(const LinkFrameHeader& h) {
  if (h.kind < FrameKind::data || h.kind > FrameKind::answer) return "unknown kind";
  if (h.reserved || h.padding || h.is_checked > 1) return "reserved bits set";
  if (h.kind != FrameKind::data) return h.num_bytes ? "control frame with a payload" : nullptr;
  if (h.num_bytes > slice_bytes) return "slice too long";
  if (h.offset > h.total_bytes || h.num_bytes > h.total_bytes - h.offset) return "slice outside its message";
  if (h.num_bytes == 0 && h.total_bytes != 0) return "empty slice";
  return nullptr;
}

inline LinkFrameHeader control_frame(FrameKind kind, std::uint64_t sequence = 0) {
  LinkFrameHeader header;
  header.kind = kind;
  header.sequence = sequence;
  return header;
}

inline std::uint32_t checksum_of(LinkFrameHeader header) {
  header.checksum = 0;
  return crc32c(0, &header, sizeof header);
}

}  // namespace paceline
